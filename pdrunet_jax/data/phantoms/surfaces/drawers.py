"""Processes that draw X-rays; in threads, Python's global lock lets hardly two draw at a time."""

import mmap
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, Generic, ParamSpec, TypeVar

from pdrunet_jax.runtime.errors import RunError
from pdrunet_jax.runtime.files import writing

_LENGTH = 8  # bytes of the number in front of the shared file: how long its head is
_ALIGNED = 64
_DYING = 5.0  # seconds for a process to end whose pipe has

Process = subprocess.Popen[bytes]
P = ParamSpec("P")
R = TypeVar("R")


class Drawers(Generic[P, R]):
    """A function in several processes. They end when this object or the process that made it does."""

    def __init__(self, function: Callable[P, R], count: int) -> None:
        """Start `count` processes. `function` is pickled; the arrays that it takes along stay in memory that all share.

        Raises `RunError` if the disk refuses.
        """
        self._idle: queue.SimpleQueue[Process] = queue.SimpleQueue()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        processes = []
        with tempfile.TemporaryFile() as file:  # without a name: nothing is left of it, however this process ends
            with writing(Path(tempfile.gettempdir())):
                _write(function, file)
            for _ in range(count):
                command = [sys.executable, "-m", __name__, str(file.fileno())]
                processes.append(
                    subprocess.Popen(
                        command,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        pass_fds=(file.fileno(),),
                        env=environment,
                    )
                )
        for process in processes:
            self._idle.put(process)
        self._end = weakref.finalize(self, _end, processes)

    def __call__(self, *arguments: P.args, **options: P.kwargs) -> R:
        """What the function returns, in one of the processes. May be called in several threads.

        Raises what the function raises, and `RunError` if the process has ended.
        """
        process = self._idle.get()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pickle.dump((arguments, options), process.stdin)
            process.stdin.flush()
            done, reply = pickle.load(process.stdout)
        except (OSError, EOFError, ValueError, pickle.UnpicklingError):
            try:
                code = process.wait(_DYING)
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
            raise RunError(
                f"a process that draws X-rays has ended (exit code {code}). A training resumes with the same command. "
                "If memory was short, give fewer --data.threads"
            ) from None
        finally:
            self._idle.put(process)
        if not done:
            raise reply
        result: R = reply
        return result

    def close(self) -> None:
        """End the processes."""
        self._end()


def _end(processes: Sequence[Process]) -> None:
    for process in processes:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            try:
                assert pipe is not None
                pipe.close()
            except OSError:  # a request that could not be sent
                pass


def _write(function: Callable[..., object], file: IO[bytes]) -> None:
    """Write `function` so that processes can share its arrays: a number, the head of that length, and the arrays."""
    buffers: list[pickle.PickleBuffer] = []
    content = pickle.dumps(function, protocol=5, buffer_callback=buffers.append)
    parts = [buffer.raw() for buffer in buffers]
    places, at = [], 0
    for part in parts:
        places.append((at, part.nbytes))
        at += -(-part.nbytes // _ALIGNED) * _ALIGNED
    head = pickle.dumps((content, places))
    head += bytes(-(len(head) + _LENGTH) % _ALIGNED)
    file.write(len(head).to_bytes(_LENGTH, "little") + head)
    for part, (_, length) in zip(parts, places, strict=True):
        file.write(part)
        file.write(bytes(-length % _ALIGNED))
    file.flush()


def _read(descriptor: int) -> Callable[..., object]:
    """Read what `_write` has written; the arrays stay in the file, whose memory all processes share."""
    memory = memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
    start = _LENGTH + int.from_bytes(memory[:_LENGTH], "little")
    content, places = pickle.loads(memory[_LENGTH:start])
    buffers = [memory[start + at : start + at + length] for at, length in places]
    function: Callable[..., object] = pickle.loads(content, buffers=buffers)
    return function


def _serve(descriptor: int, requests: IO[bytes], replies: IO[Any]) -> None:
    """Call the function with what comes until nobody asks any more."""
    function = _read(descriptor)
    while True:
        try:
            arguments, options = pickle.load(requests)
        except EOFError:
            return
        try:
            reply = True, function(*arguments, **options)
        except Exception as error:  # raised again where it was asked for
            reply = False, error
        pickle.dump(reply, replies, protocol=5)
        replies.flush()


def main() -> None:
    """Run one of the processes."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)  # whoever asks ends this process, after the last answer
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what is printed is no reply
    try:
        _serve(int(sys.argv[1]), sys.stdin.buffer, replies)
    except BrokenPipeError:  # nobody is there
        os._exit(0)


if __name__ == "__main__":
    main()
