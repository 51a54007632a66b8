"""Atomic files and folders: complete or absent, whatever happens."""

import csv
import io
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pdrunet_jax.runtime.errors import RunError, UserError


def atomic_write(path: Path, data: bytes | str) -> None:
    """Replace the contents of `path` by `data`, or leave it unchanged if that fails.

    Raises `OSError` if the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")  # a fixed name: what a killed process leaves is replaced next time
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:  # exclusively: never through a link that somebody put there
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


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
