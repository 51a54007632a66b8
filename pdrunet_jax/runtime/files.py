"""Files and folders that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pdrunet_jax.runtime.errors import RunError, UserError


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write `path` so that it holds either what it held before or all of `data`, whatever happens.

    Raises `OSError` if the disk refuses; the earlier file is then intact.
    """
    temporary = path.with_name(f".{path.name}.tmp")  # one name, so that a killed process leaves no litter behind
    try:
        with temporary.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the disk refuses inside the block becomes a `RunError` that names `path`."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror or error})") from None


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, from the system's memory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_vacant(root: Path) -> None:
    """Raise `UserError` if `root` is anything but absent or an empty folder."""
    try:
        vacant = not root.exists() or (root.is_dir() and not any(root.iterdir()))
    except OSError as error:
        raise UserError(f"{root}: {error.strerror}") from None
    if not vacant:
        raise UserError(f"{root} exists and is not empty; name a new folder, or remove it")


@contextmanager
def new_folder(root: Path, what: str = "the dataset") -> Iterator[Path]:
    """A folder to write to that becomes `root` in one step when the block ends well, and vanishes when it does not.

    Raises `UserError` if `root` holds something already, or `what` cannot be written to it.
    """
    require_vacant(root)
    try:
        parent = root.absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
        workplace = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=parent))
    except OSError as error:
        raise UserError(f"{what} cannot be written to {root}: {error.strerror}") from None
    try:
        folder = workplace / "dataset"  # made here with the usual permissions; mkdtemp's own folder is private
        folder.mkdir()
        yield folder
        if root.exists():
            root.rmdir()
        folder.rename(root)
    except OSError as error:
        raise UserError(f"{what} cannot be written to {root}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(workplace, ignore_errors=True)
