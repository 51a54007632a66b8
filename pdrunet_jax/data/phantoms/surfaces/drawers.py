"""Processes that draw X-rays for training; in threads, Python's global lock lets hardly two draw at a time."""

import mmap
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from pdrunet_jax.data.cache import Resized
from pdrunet_jax.data.phantoms.surfaces.training import DrawnAnew
from pdrunet_jax.runtime.errors import RunError
from pdrunet_jax.runtime.files import writing

_LENGTH = 8  # bytes of the number in front of a file of bodies: how long its head is
_ALIGNED = 64

Process = subprocess.Popen[bytes]


class Drawers:
    """Processes that draw the same images as `DrawnAnew.image`. They end when this object or its process does."""

    def __init__(self, drawn: DrawnAnew, count: int) -> None:
        """Start `count` processes, which share the bodies' memory. Raises `RunError` if the disk refuses."""
        self._idle: queue.SimpleQueue[Process] = queue.SimpleQueue()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        processes = []
        with tempfile.TemporaryFile() as file:  # without a name: nothing is left of it, however this process ends
            with writing(Path(tempfile.gettempdir())):
                _write(drawn, file)
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

    def images(self, numbers: Sequence[int], seed: int, channels: int) -> list[Resized]:
        """Draw the images `numbers` of a run with `seed`, in one of the processes. May be called in several threads.

        Raises `RunError` if the process has ended.
        """
        process = self._idle.get()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pickle.dump((numbers, seed, channels), process.stdin)
            process.stdin.flush()
            images: list[Resized] = pickle.load(process.stdout)
        except (OSError, EOFError, ValueError, pickle.UnpicklingError):
            process.kill()
            code = process.wait()
            raise RunError(
                f"a process that draws training images has ended (exit code {code}); the same command resumes. If "
                "memory was short, give fewer --data.threads"
            ) from None
        finally:
            self._idle.put(process)
        return images

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


def _write(drawn: DrawnAnew, file: IO[bytes]) -> None:
    """Write `drawn` so that processes can share its arrays: a number, the head of that length, and the arrays."""
    buffers: list[pickle.PickleBuffer] = []
    content = pickle.dumps(drawn, protocol=5, buffer_callback=buffers.append)
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


def _read(descriptor: int) -> DrawnAnew:
    """Read what `_write` has written; the arrays stay in the file, whose memory all processes share."""
    memory = memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
    start = _LENGTH + int.from_bytes(memory[:_LENGTH], "little")
    content, places = pickle.loads(memory[_LENGTH:start])
    buffers = [memory[start + at : start + at + length] for at, length in places]
    drawn: DrawnAnew = pickle.loads(content, buffers=buffers)
    return drawn


def _serve(descriptor: int, requests: IO[bytes], replies: IO[Any]) -> None:
    """Draw what is asked for until nobody asks any more."""
    drawn = _read(descriptor)
    while True:
        try:
            numbers, seed, channels = pickle.load(requests)
        except EOFError:
            return
        pickle.dump(drawn.images(numbers, seed, channels), replies, protocol=5)
        replies.flush()


def main() -> None:
    """Run one of the processes."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)  # the training ends this process, after its last batch
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what is printed is no reply
    try:
        _serve(int(sys.argv[1]), sys.stdin.buffer, replies)
    except BrokenPipeError:  # the training is gone
        os._exit(0)


if __name__ == "__main__":
    main()
