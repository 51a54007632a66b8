"""Digests that show whether files are still what was written: a checkpoint counts only with a digest that matches.

The digest file of a folder is in the form of `sha256sum` (`sha256sum -c digest.sha256` checks it by hand) with one
comment line that guards the list itself. Files of weights carry the digest of their arrays and options in their header.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pdrunet_jax.runtime.files import atomic_write, sync

DIGEST = "digest.sha256"
CONTENT = "digest"
"""Key of the options of a file of weights under which its `content_digest` is."""
_GUARD = "# sha256 of the lines above: "


def seal(folder: Path) -> None:
    """Bring every file of `folder` to the disk, then write their digests beside them, as the last thing.

    Raises `OSError` if the disk refuses.
    """
    for path in sorted(folder.rglob("*"), reverse=True):  # files and subfolders before the folder that names them
        sync(path)
    lines = "".join(f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in _files(folder))
    atomic_write(folder / DIGEST, f"{lines}{_GUARD}{_guard(lines)}\n")


def faults(folder: Path) -> Iterator[str]:
    """Everything that is wrong with a sealed folder, a few words for each file; nothing if it is what was sealed."""
    if not folder.is_dir():
        yield "it is no folder"
        return
    try:
        text = (folder / DIGEST).read_bytes().decode()
    except FileNotFoundError:
        yield "it is empty" if not any(folder.iterdir()) else f"{DIGEST} is missing"
        return
    except (OSError, UnicodeDecodeError) as error:
        yield f"{DIGEST} cannot be read ({error})"
        return
    lines, _, guard = text.rpartition(_GUARD)
    if not lines or guard != f"{_guard(lines)}\n":
        yield f"{DIGEST} itself is damaged"
        return
    for line in lines.splitlines():
        digest, _, name = line.partition("  ")
        path, parts = folder / name, PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts:  # neither followed nor opened: it could be a device
            yield f"{DIGEST} names {name}, which is not in it"
        elif not path.is_file():
            yield f"{name} is missing" if not path.exists() else f"{name} is no file"
        else:
            try:
                found = sha256(path)
            except OSError as error:
                yield f"{name} cannot be read ({error.strerror})"
                continue
            if found != digest:
                yield f"{name} is not what was written"


def content_digest(arrays: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """SHA-256 of NumPy arrays with their names, types and shapes, and of the options beside them."""
    digest = hashlib.sha256(json.dumps({**options, CONTENT: None}, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / DIGEST)


def sha256(path: Path) -> str:
    """The digest of a file. Raises `OSError`."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _guard(lines: str) -> str:
    return hashlib.sha256(lines.encode()).hexdigest()
