"""How a command is told that it is one of several processes. No setting of a run: it has no part in the result.

Several processes that train or score together: how they find each other, what the first alone does, how they end.

The first process alone touches the run folder; every process reads its own share of the data. They meet in the
coordination service of `jax.distributed`, which the first process runs. What one process cannot do, none of the others
waits for: its message ends all of them (see `Group`).

JAX is imported where it is used: it takes longer to load than a wrong command line may take to be refused.
"""

import contextlib
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, NoReturn

import tyro

from pdrunet_jax.runtime import cli
from pdrunet_jax.runtime.errors import RunError, UserError
from pdrunet_jax.runtime.stop import StopFlag

DetectCluster = Annotated[bool, tyro.conf.arg(name="distributed"), tyro.conf.FlagCreatePairsOff]
"""The option --distributed, alone, beside those of `Distributed`."""


@dataclass(frozen=True)
class Distributed:
    """Several processes, on one machine or many; see docs/distributed.md.

    On SLURM, Kubernetes and Cloud TPU, --distributed alone finds out everything. Elsewhere each process is given
    coordinator, processes and index.
    """

    coordinator: str | None = None
    """HOST:PORT at which all processes reach the first one; any free port of its machine."""
    processes: int | None = None
    """How many there are."""
    index: int | None = None
    """Which one this is; 0 is the first."""
    timeout: int = 300
    """Seconds to wait for the others at the start."""

    def wanted(self, detect: bool) -> bool:
        """Whether several processes were asked for. Raises `UserError` if it was said by halves or makes no sense."""
        given = {"coordinator": self.coordinator, "processes": self.processes, "index": self.index}
        missing = [f"--distributed.{name}" for name, value in given.items() if value is None]
        if self.timeout < 1:
            raise UserError(f"--distributed.timeout {self.timeout}: at least 1 second")
        if len(missing) == 3:
            return detect
        if self.coordinator is None or self.processes is None or self.index is None:
            raise UserError(
                f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: without a cluster that JAX "
                "knows, give all of --distributed.coordinator HOST:PORT --distributed.processes N --distributed.index I"
            )
        if not re.fullmatch(r"[^:\s]+:[0-9]{1,5}|\[[0-9a-fA-F:.]+\]:[0-9]{1,5}", self.coordinator):
            raise UserError(f"--distributed.coordinator {self.coordinator}: give HOST:PORT, as in node1:9000")
        if self.processes < 1:
            raise UserError(f"--distributed.processes {self.processes}: at least 1")
        if not 0 <= self.index < self.processes:
            raise UserError(
                f"--distributed.index {self.index}: the {self.processes} processes are numbered "
                f"from 0 to {self.processes - 1}"
            )
        return True


HEARTBEAT = 30
"""Seconds without a sign of life after which a process counts as dead, and all others end."""
LEAVING = 5
"""Seconds that a process which ends with an error gives the others to read why."""
LAST = 3
"""Seconds that the first process stays when all others know that they are to end."""
_FOREVER = 7 * 24 * 3600 * 1000
_PART = 1 << 20
"""Bytes that are sent at once: a message of the coordination service holds 4 MiB."""
_FAILED, _TOLD = "pdrunet_jax/failed", "pdrunet_jax/told"


@dataclass(frozen=True)
class Group:
    """This process among all that work together; alone it is the first of one, and every method does nothing.

    All of them call the methods in the same order.
    """

    index: int = 0
    count: int = 1
    _calls: Iterator[int] = field(default_factory=itertools.count, compare=False, repr=False)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes, and speaks."""
        return self.index == 0

    def log(self, line: str) -> None:
        """Print a line, in the first process."""
        if self.is_main:
            print(line, flush=True)

    def wait(self) -> None:
        """Go on when every process has come here."""
        if self.count > 1:
            _client().wait_at_barrier(self._key(), _FOREVER)

    @contextlib.contextmanager
    def first_before_others(self) -> Iterator[None]:
        """The block is done by the first process, then by all others at once: what the first makes, they find."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()

    def broadcast(self, value: str) -> str:
        """What the first process gives as `value`, in every process."""
        key = self._key()
        if self.is_main:
            if self.count > 1:
                _client().key_value_set(key, value)
            return value
        found: str = _client().blocking_key_value_get(key, _FOREVER)
        return found

    def require_same(self, value: str, what: str) -> None:
        """Raise `UserError` that says `what` is to be done unless `value` is that of the first process."""
        if self.broadcast(value) != value:
            raise UserError(f"process {self.index} of {self.count}: {what}")

    def broadcast_arrays(self, tree: Any) -> Any:
        """`tree` with the arrays of the first process in every process, bit for bit, as NumPy arrays."""
        if self.count == 1:
            return tree
        import jax
        import numpy as np
        from jax.experimental import multihost_utils

        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
        # As bytes: the processes add up what they have, and 0.0 + -0.0 is not -0.0.
        sent = multihost_utils.broadcast_one_to_all(
            np.frombuffer(b"".join(leaf.tobytes() for leaf in leaves), np.uint8)
        )
        received, place = np.asarray(sent).tobytes(), 0
        filled = []
        for leaf in leaves:
            part = received[place : place + leaf.nbytes]
            filled.append(np.frombuffer(part, leaf.dtype).reshape(leaf.shape).copy())
            place += leaf.nbytes
        return jax.tree.unflatten(jax.tree.structure(tree), filled)

    def exchange(self, value: bytes) -> list[bytes]:
        """What every process gives as `value`, in their order, in all of them."""
        if self.count == 1:
            return [value]
        client, key = _client(), self._key()
        for part in range(0, len(value), _PART):
            client.key_value_set_bytes(f"{key}/{self.index}/{part}", value[part : part + _PART])
        client.key_value_set(f"{key}/{self.index}/length", str(len(value)))
        found = []
        for index in range(self.count):
            length = int(client.blocking_key_value_get(f"{key}/{index}/length", _FOREVER))
            parts = range(0, length, _PART)
            found.append(
                b"".join(client.blocking_key_value_get_bytes(f"{key}/{index}/{part}", _FOREVER) for part in parts)
            )
        return found

    def _key(self) -> str:
        """What this call is known by in the coordination service."""
        return f"pdrunet_jax/{next(self._calls)}"


@contextlib.contextmanager
def join(options: Distributed, detect: bool, stop: StopFlag | None = None) -> Iterator[Group]:
    """The group of processes that `options` describe, from when all are there until all are done.

    An error that leaves the block in one process ends all of them: this one with its own message and exit code, the
    others with that message and 1. That does not return: an orderly end would wait for processes that are stuck. Nor
    does a request to `stop` while the others are waited for.

    Raises:
        UserError: the options make no sense, or JAX knows no cluster here.
    """
    if not options.wanted(detect):
        yield Group()
        return
    group = _connect(options, stop)
    threading.Thread(target=_end_with_others, args=(group,), daemon=True).start()
    try:
        yield group
        group.wait()
    except BaseException as error:
        _end(group, error)
    import jax

    jax.distributed.shutdown()


def _connect(options: Distributed, stop: StopFlag | None = None) -> Group:
    """Meet the other processes."""
    import jax
    from jax._src import distributed

    errors: list[Exception] = []

    def meet() -> None:
        try:
            jax.distributed.initialize(
                options.coordinator,
                options.processes,
                options.index,
                initialization_timeout=options.timeout + 60,  # JAX ends the process then, without a word that helps
                heartbeat_timeout_seconds=HEARTBEAT,
            )
        except (ValueError, RuntimeError, KeyError) as error:
            errors.append(error)

    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from `StopFlag`
    who = "" if options.index is None else f"process {options.index} of {options.processes}: "
    meeting = threading.Thread(target=meet, daemon=True)  # not in the main thread, which alone receives signals
    end = time.monotonic() + options.timeout
    meeting.start()
    while meeting.is_alive():
        meeting.join(0.05)
        if stop:
            os._exit(cli.STOPPED)  # nothing was begun
        if meeting.is_alive() and time.monotonic() > end:
            print(f"error: {who}{_nobody(options)}", file=sys.stderr, flush=True)
            os._exit(UserError.exit_code)
    if errors:
        reason = str(errors[0]).splitlines()[0]
        if options.coordinator is None:
            raise UserError(
                f"--distributed: JAX finds no cluster here ({reason}). On SLURM start it with srun; elsewhere give "
                "--distributed.coordinator HOST:PORT --distributed.processes N --distributed.index I"
            )
        raise UserError(
            f"{who}--distributed.coordinator {options.coordinator} cannot be opened ({reason}); is the port in use?"
        )
    # As JAX has them: its public names would start the devices, before precision and flags are set.
    return Group(distributed.global_state.process_id, distributed.global_state.num_processes)


def _nobody(options: Distributed) -> str:
    """Why the processes have not met in time."""
    text = f"the processes did not find each other within {options.timeout} s: "
    if options.coordinator is None or options.index == 0:
        return text + "not all of them were started, or they do not reach the first one"
    if problem := _unreachable(options.coordinator):
        return f"{text}--distributed.coordinator {options.coordinator} does not answer ({problem})"
    return f"{text}{options.coordinator} answers, but not all {options.processes} processes were started"


def place_among(options: Distributed, detect: bool, stop: StopFlag | None = None) -> tuple[int, int] | None:
    """Which process this is, and of how many, for work that they share without meeting again; None if it is alone.

    Raises `UserError` as `join`.
    """
    if not options.wanted(detect):
        return None
    if options.index is not None and options.processes is not None:
        return options.index, options.processes
    group = _connect(options, stop)
    import jax

    jax.distributed.shutdown()
    return group.index, group.count


def _unreachable(coordinator: str) -> str:
    host, _, port = coordinator.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        return str(error)
    return ""


def _end_with_others(group: Group) -> None:
    """Wait for another process's message, in a thread of its own, and end with it."""
    try:
        text = _client().blocking_key_value_get(_FAILED, _FOREVER)
    except Exception:  # the end, or the first process is gone, which is noticed elsewhere
        return
    failure = json.loads(text)
    if failure["index"] == group.index:
        return
    with contextlib.suppress(Exception):
        _client().key_value_set(f"{_TOLD}/{group.index}", "")
    where = f"process {failure['index']} of {group.count} on {failure['host']}"
    print(f"error: process {group.index} ends: {where} failed: {failure['message']}", file=sys.stderr, flush=True)
    _let_others_leave(group)
    os._exit(RunError.exit_code)


def _end(group: Group, error: BaseException) -> NoReturn:
    """Say why this process ends, tell the others, and end."""
    code = RunError.exit_code
    if isinstance(error, UserError | RunError):
        code, message = error.exit_code, str(error)
    elif _lost(error):
        message = (
            f"process {group.index} of {group.count}: another process has ended, or cannot be reached any more "
            f"({_first_line(error)}). The same command in all processes resumes"
        )
    else:
        traceback.print_exception(error)
        message = f"{type(error).__name__}: {error}"
    print(f"error: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    failure: Mapping[str, Any] = {"index": group.index, "host": socket.gethostname(), "message": message[:2000]}
    with contextlib.suppress(Exception):  # another one was first, or the first process is gone
        client = _client()
        client.key_value_set(_FAILED, json.dumps(failure))
        end = time.monotonic() + LEAVING
        while len(client.key_value_dir_get(_TOLD)) < group.count - 1 and time.monotonic() < end:
            time.sleep(0.05)
    _let_others_leave(group)
    os._exit(code)


def _let_others_leave(group: Group) -> None:
    """The first process runs the service that all are tied to, and goes last: JAX aborts whoever it leaves behind."""
    if group.is_main and group.count > 1:
        time.sleep(LAST)


def _lost(error: BaseException) -> bool:
    """Whether an error says that a collective operation had nobody at its other end."""
    known = re.search(r"gloo|nccl|collective|coordination|connection|barrier|heartbeat|peer", str(error), re.IGNORECASE)
    return isinstance(error, ValueError | RuntimeError) and known is not None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def _client() -> Any:
    """The coordination service: JAX has no public name for it."""
    from jax._src import distributed

    return distributed.global_state.client
