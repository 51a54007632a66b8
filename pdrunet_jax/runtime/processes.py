"""Training and evaluation in several processes: options, start-up, the exchange between processes, and shutdown.

Only the main process (index 0) touches the run folder; every process reads its own share of the data. They meet through
`jax.distributed` and exchange data with `jax.experimental.multihost_utils`. JAX is imported inside functions, so that a
wrong command line is refused before JAX loads.
"""

import contextlib
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Annotated, NoReturn, TypeVar

import numpy as np
import tyro

from pdrunet_jax.runtime import cli
from pdrunet_jax.runtime.errors import RunError, UserError, explained
from pdrunet_jax.runtime.stop import StopFlag

HEARTBEAT = 30
"""Seconds without a heartbeat after which a process counts as dead and JAX ends the others."""
LINGER = 3
"""Seconds the main process stays after an error: JAX aborts the others as soon as it leaves, and they may have a
message of their own."""
WEEK = 7 * 24 * 3600
"""Seconds the other processes wait at the end, while the main process scores and writes the report."""

Tree = TypeVar("Tree")

DetectCluster = Annotated[bool, tyro.conf.arg(name="distributed"), tyro.conf.FlagCreatePairsOff]
"""The option --distributed; see `Distributed` for the rest of the group."""


@dataclass(frozen=True)
class Distributed:
    """Several processes, on one machine or many; see docs/distributed.md.

    On SLURM, Kubernetes and Cloud TPU, --distributed alone is enough. Elsewhere give each process coordinator,
    processes and index.
    """

    coordinator: str | None = None
    """HOST:PORT of the first process; any free port of its machine."""
    processes: int | None = None
    """Number of processes."""
    index: int | None = None
    """Index of this process, from 0."""
    timeout: int = 300
    """Seconds to wait for the other processes at the start."""

    def wanted(self, detect: bool) -> bool:
        """Return whether several processes were requested. Raises `UserError` if the options are wrong."""
        given = {"coordinator": self.coordinator, "processes": self.processes, "index": self.index}
        missing = [f"--distributed.{name}" for name, value in given.items() if value is None]
        if self.timeout < 1:
            raise UserError(f"--distributed.timeout {self.timeout}: give at least 1 second")
        if len(missing) == 3:
            return detect
        if self.coordinator is None or self.processes is None or self.index is None:
            raise UserError(
                f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: give all of "
                "--distributed.coordinator HOST:PORT --distributed.processes N --distributed.index I, or --distributed "
                "alone on SLURM, Kubernetes or Cloud TPU"
            )
        address = re.fullmatch(r"([^:\s]+|\[[0-9a-fA-F:.]+\]):([0-9]{1,5})", self.coordinator)
        if not address or int(address[2]) > 65535:
            raise UserError(f"--distributed.coordinator {self.coordinator}: give HOST:PORT, as in node1:9000")
        if self.processes < 1:
            raise UserError(f"--distributed.processes {self.processes}: give at least 1")
        if not 0 <= self.index < self.processes:
            raise UserError(
                f"--distributed.index {self.index}: give 0 to {self.processes - 1} "
                f"for --distributed.processes {self.processes}"
            )
        return True


@dataclass(frozen=True)
class Group:
    """The processes of one command, seen from this one. A single process is the main one of a group of one.

    All processes must call the collective methods (`wait`, `main_first`, `gather`, `broadcast`, `broadcast_arrays`,
    `require_same`) in the same order.
    """

    index: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.index == 0

    def log(self, line: str) -> None:
        """Print a line in the main process."""
        if self.is_main:
            print(cli.printable(line), flush=True)

    def wait(self) -> None:
        """Return once every process has called this."""
        if self.count > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("pdrunet_jax")

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block in the main process, then in all others at once: they find the files it has made."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()

    def gather(self, value: bytes) -> list[bytes]:
        """Return the `value` of every process, in the order of their indices."""
        if self.count == 1:
            return [value]
        from jax.experimental import multihost_utils

        lengths = multihost_utils.process_allgather(np.int32(len(value)))
        padded = np.zeros(max(int(lengths.max()), 1), np.uint8)
        padded[: len(value)] = np.frombuffer(value, np.uint8)
        rows = multihost_utils.process_allgather(padded)
        return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]

    def broadcast(self, value: str) -> str:
        """Return the `value` of the main process."""
        return self.gather(value.encode() if self.is_main else b"")[0].decode() if self.count > 1 else value

    def broadcast_arrays(self, tree: Tree) -> Tree:
        """Return `tree` with the arrays of the main process, bit for bit, as NumPy arrays; alone, `tree` itself."""
        if self.count == 1:
            return tree
        import jax
        from jax.experimental import multihost_utils

        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
        # As bytes: a broadcast sums over the processes, and 0.0 + -0.0 is not -0.0.
        parts = [leaf.reshape(-1).view(np.uint8) for leaf in leaves]
        sent = np.asarray(multihost_utils.broadcast_one_to_all(np.concatenate(parts)))
        received = np.split(sent, np.cumsum([part.size for part in parts])[:-1])
        arrays = [part.copy().view(leaf.dtype).reshape(leaf.shape) for part, leaf in zip(received, leaves, strict=True)]
        filled: Tree = jax.tree.unflatten(jax.tree.structure(tree), arrays)
        return filled

    def require_same(self, value: str, what: str) -> None:
        """Raise `UserError` with the remedy `what`, in every process, unless all have the `value` of the main one."""
        values = self.gather(value.encode())
        unlike = [str(index) for index, other in enumerate(values) if other != values[0]]
        if unlike:
            raise UserError(f"process {' and '.join(unlike)} of {self.count}: {what}")


@contextlib.contextmanager
def join(options: Distributed, detect: bool, stop: StopFlag | None = None) -> Iterator[Group]:
    """Form the group described by `options`; on leaving the block, wait for all processes.

    This starts JAX's devices: set precision and XLA flags before. If the block raises in a group of several, the
    process prints the message and leaves with its exit code at once; JAX ends the others when their next collective
    fails or after `HEARTBEAT` seconds. A request to `stop` during start-up leaves with exit code 75.

    Raises:
        UserError: the options are wrong, or JAX detects no cluster.
    """
    if not options.wanted(detect):
        yield Group()
        return
    import jax

    _connect(options, stop)
    group = Group(*_start_devices())
    linger = LINGER if group.is_main else 0
    try:
        yield group
    except BaseException as error:
        if (known := explained(error)) is not None:
            _leave(known.exit_code, str(known), linger)
        traceback.print_exception(error)
        message = (
            f"process {group.index} of {group.count} failed as shown above. If another process ended first, its "
            "message names the cause. The same command in all processes resumes"
        )
        _leave(RunError.exit_code, message, linger)
    jax.distributed.shutdown()  # waits for all processes


def _connect(options: Distributed, stop: StopFlag | None) -> None:
    """Call `jax.distributed.initialize`, with a message for each way in which it fails."""
    import jax

    where = f"--distributed.coordinator {options.coordinator}"
    who = "" if options.index is None else f"process {options.index} of {options.processes}: "
    if options.coordinator is not None and options.index == 0:
        # JAX listens at this port on all addresses. If it is taken, JAX's service may crash instead of raising.
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        port = int(options.coordinator.rpartition(":")[2])
        try:
            socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6).close()
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise UserError(f"{who}cannot listen at {where} ({reason}); choose a free port") from None
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from `StopFlag`
    # In a thread, since the call does not return for signals, and aborts the process when its own time is over.
    thread = ThreadPoolExecutor(1)
    connected = thread.submit(
        jax.distributed.initialize,
        options.coordinator,
        options.processes,
        options.index,
        initialization_timeout=options.timeout + 60,
        heartbeat_timeout_seconds=HEARTBEAT,
        shutdown_timeout_seconds=WEEK,
    )
    end = time.monotonic() + options.timeout
    try:
        while not wait([connected], timeout=0.05).done:
            if stop:
                _leave(cli.STOPPED)
            if time.monotonic() > end:
                first = "the first one" if options.coordinator is None else where
                message = f"the processes did not find each other within {options.timeout} s"
                _leave(UserError.exit_code, f"{who}{message}: start all, and check that they can reach {first}")
        connected.result()
    except KeyboardInterrupt:
        _leave(cli.STOPPED)
    except (ValueError, RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[0]
        if options.coordinator is not None:
            raise UserError(f"{who}cannot start at {where}: {reason}") from None
        raise UserError(
            f"--distributed: JAX detects no cluster ({reason}). On SLURM start the command with srun; elsewhere "
            "give --distributed.coordinator HOST:PORT --distributed.processes N --distributed.index I"
        ) from None
    thread.shutdown()


def _start_devices() -> tuple[int, int]:
    """Start JAX's devices and return the index and the number of processes."""
    import jax

    from pdrunet_jax.runtime.devices import start_devices

    try:
        start_devices()
    except UserError as error:
        _leave(UserError.exit_code, str(error), LINGER)
    return jax.process_index(), jax.process_count()


def _leave(code: int, message: str = "", linger: float = 0) -> NoReturn:
    """End this process with its own message and exit code.

    An ordinary exit would not do: JAX waits for the other processes in it and then aborts with a code of its own, and
    a thread may still be connecting.
    """
    if message:
        print(f"error: {cli.printable(message)}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(linger)
    os._exit(code)
