"""Atomic files and folders: complete or absent, whatever happens."""

import csv
import ctypes
import errno
import io
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pdrunet_jax.runtime.errors import RunError, UserError
from pdrunet_jax.runtime.opening import require_regular

TEMPORARY = ".pdrunet-*.tmp"
"""Pattern of the names that `atomic_write` writes under; only a killed process leaves such a file behind."""

_EXCHANGE, _HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of Linux


def atomic_write(path: Path, data: bytes | str) -> None:
    """Replace `path` by a file that contains `data`, or leave it unchanged if that fails.

    A link is replaced, not followed. Raises `OSError` if the file cannot be written.
    """
    # Made exclusively under a name that nobody can guess: never through a link that somebody has put there.
    temporary = path.with_name(TEMPORARY.replace("*", secrets.token_hex(8)))
    content = data.encode() if isinstance(data, str) else data
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None  # not the temporary name
        raise
    sync(path.parent)


def open_in_place(path: Path, flags: int) -> int:
    """Open `path` with `flags` to write in it, and make it if it is absent; returns the descriptor.

    Raises `OSError` if it is a link or no regular file.
    """
    try:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP and path.is_symlink():
            raise OSError(errno.ELOOP, "it is a symbolic link, which is not followed", str(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.ENXIO, "it is not a regular file", str(path))
    return descriptor


def is_present(path: Path) -> bool:
    """Whether the file `path` exists. Raises `UserError` for a broken link, and for anything but a regular file."""
    try:
        require_regular(path.stat(), path)
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            target = os.readlink(path)
            raise UserError(f"{path} is a broken link to {target}; restore its target, or remove it") from None
        return False
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; restore the file, or remove what has its name") from None
    return True


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """Rows of cells as CSV, with a line feed after each.

    Spreadsheets run text that begins as a formula. Such a cell, unless it is a number, gets an apostrophe in front;
    `csv_name` removes it.
    """
    text = io.StringIO()
    safe = ([f"'{cell}" if isinstance(cell, str) and _is_formula(cell) else cell for cell in row] for row in rows)
    csv.writer(text, lineterminator="\n").writerows(safe)
    return text.getvalue()


def csv_name(cell: str) -> str:
    """The text that `csv_text` wrote as `cell`."""
    return cell[1:] if cell.startswith("'") and _is_formula(cell[1:]) else cell


def _is_formula(cell: str) -> bool:
    # Also behind apostrophes, so that every name can be read back.
    if not cell.lstrip("'").startswith(("=", "+", "-", "@", "\t", "\r", "\n")):
        return False
    try:
        float(cell)
    except ValueError:
        return True
    return False


def require_replaceable(path: Path, source: Path, force: bool) -> None:
    """Raise `UserError` if `path` exists and is the `source` itself, or may not be replaced without `force`."""
    if not path.exists():
        return
    if source.exists() and source.resolve() == path.resolve():
        raise UserError(f"{path} is the file to read itself; give another name")
    if not force:
        raise UserError(f"{path} exists; give --force to replace it")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an `OSError` inside the block into a `RunError` that names `path`."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror or error})") from None


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_vacant(root: Path) -> bool:
    """Whether `root` is absent or an empty folder. Raises `UserError` if it cannot be read."""
    try:
        return not root.exists() or (root.is_dir() and not any(root.iterdir()))
    except OSError as error:
        raise UserError(f"{root}: {error.strerror}") from None


def require_vacant(root: Path) -> None:
    """Raise `UserError` unless `root` is absent or an empty folder."""
    if not is_vacant(root):
        raise UserError(f"{root} exists and is not empty; name a new folder, or remove it")


def require_inside(root: Path, *folders: Path) -> None:
    """Raise `UserError` if one of `folders`, which are named below `root`, is elsewhere because of a link.

    `root` itself may be a link.
    """
    base = os.path.realpath(root)
    for folder in folders:
        if os.path.commonpath([base, os.path.realpath(folder)]) != base:
            raise UserError(f"{folder} leads out of {root} by a link, which is not followed; remove the link")


def replace_folder(new: Path, old: Path) -> None:
    """Put the folder `new` in the place of `old`, which ends where `new` was if it exists. Raises `OSError`.

    Linux exchanges the two at once. Where the file system cannot do that, `old` is absent for a moment.
    """
    if not old.exists():
        new.rename(old)
        return
    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if exchange is not None and exchange(_HERE, os.fsencode(new), _HERE, os.fsencode(old), _EXCHANGE) == 0:
        return
    aside = new.with_name(f"{new.name}-replaced")
    old.rename(aside)
    try:
        new.rename(old)
    except BaseException:
        aside.rename(old)
        raise
    aside.rename(new)


@contextmanager
def new_folder(root: Path, what: str = "the dataset") -> Iterator[Path]:
    """A temporary folder that becomes `root` if the block succeeds, and is removed if it raises.

    Raises `UserError` if `root` is not vacant, or `what` cannot be written to it.
    """
    require_vacant(root)
    workplace = None
    try:
        parent = root.absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
        workplace = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=parent))
        folder = workplace / "dataset"  # created here with the usual permissions; mkdtemp's own folder is private
        folder.mkdir()
        yield folder
        if root.exists():
            root.rmdir()
        folder.rename(root)
    except OSError as error:
        raise UserError(f"{what} cannot be written to {root}: {error.strerror or error}") from None
    finally:
        if workplace is not None:
            shutil.rmtree(workplace, ignore_errors=True)
