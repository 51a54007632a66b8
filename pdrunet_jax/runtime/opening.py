"""Open files that come from users: regular files only, without blocking, up to a size.

A pipe, socket or device that is named like an image would block a command for ever, or fill the memory.
"""

import errno
import io
import os
import stat
from pathlib import Path

from pdrunet_jax.runtime.errors import UserError

LIMIT = "PDRUNET_MAX_FILE_MIB"
"""Environment variable: the largest file that is read into memory, in MiB."""
DEFAULT_MIB = 1024

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file of any size to read bytes. Raises `OSError`, also for pipes, sockets and devices."""
    try:
        require_regular(os.stat(path), path)  # first: to open some devices has an effect
    except FileNotFoundError:
        if os.path.islink(path):
            raise OSError(errno.ENOENT, f"a broken link to {os.readlink(path)}", str(path)) from None
        raise
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        require_regular(os.fstat(descriptor), path)  # again: it may have been replaced
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path) -> bytes:
    """The content of a regular file, up to the size that it has now; files of /proc, whose size is 0, seem empty.

    Raises `OSError`, also for pipes, sockets, devices, and files larger than `LIMIT`.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        most = _limit()
        if size > most << 20:
            raise OSError(errno.EFBIG, f"larger than {most} MiB; to read it, set {LIMIT}", str(path))
        return file.read(size)


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """The text of a regular file. Raises `OSError` as `read_regular` does, `UnicodeDecodeError`."""
    return read_regular(path).decode(encoding)


def require_regular(status: os.stat_result, path: Path) -> None:
    """Raise `OSError` that says what `path` is if its `status` is not of a regular file."""
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for test, name in _KINDS if test(status.st_mode)), "something else")
        raise OSError(errno.EINVAL, f"{kind}, not a file", str(path))


def _limit() -> int:
    text = os.environ.get(LIMIT, str(DEFAULT_MIB))
    if not (text.isascii() and text.isdigit() and int(text[:9]) > 0 and len(text) < 9):
        raise UserError(f"{LIMIT}={text}: give a whole number of MiB")
    return int(text)
