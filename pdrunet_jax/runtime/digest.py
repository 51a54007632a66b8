"""SHA-256 digests that detect damaged checkpoints and weights.

The digest file of a folder has the format of `sha256sum` (check it by hand with `sha256sum -c digest.sha256`), plus a
comment line that guards the list itself. Weights files carry the digest of their arrays and options in their header.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pdrunet_jax.runtime.files import atomic_write, sync
from pdrunet_jax.runtime.opening import open_regular, read_regular

DIGEST = "digest.sha256"
CONTENT = "digest"
"""Key of `content_digest` in the options of a weights file."""
SETTINGS = "settings"
"""Key of `config.settings_digest` in the options of a run's best weights and in its checkpoints."""
MOST_BYTES = 4 << 30
"""Largest file of a checkpoint; a larger one is not read."""
_GUARD = "# sha256 of the lines above: "


def seal(folder: Path) -> None:
    """Flush every file in `folder` to disk, then write the digest file.

    Raises `OSError` if a file cannot be written.
    """
    paths = sorted(folder.rglob("*"))
    for path in reversed(paths):  # files and subfolders before the folder that names them
        sync(path)
    files = [path for path in paths if path.is_file() and path != folder / DIGEST]
    lines = "".join(f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files)
    atomic_write(folder / DIGEST, f"{lines}{_GUARD}{_guard(lines)}\n")


def faults(folder: Path) -> Iterator[str]:
    """Describe everything that changed in a sealed folder, a few words for each file; empty if nothing did."""
    if not folder.is_dir():
        yield "it is not a folder"
        return
    if (folder / DIGEST).is_file() and (folder / DIGEST).stat().st_size > 1 << 20:
        yield f"{DIGEST} itself is damaged"
        return
    try:
        text = read_regular(folder / DIGEST).decode()
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
            yield f"{DIGEST} lists {name}, which is outside the folder"
        elif not path.is_file():
            yield f"{name} is missing" if not path.exists() else f"{name} is not a file"
        elif path.stat().st_size > MOST_BYTES:
            yield f"{name} is larger than any file of a checkpoint"
        else:
            try:
                found = sha256(path)
            except OSError as error:
                yield f"{name} cannot be read ({error.strerror})"
                continue
            if found != digest:
                yield f"{name} does not match its digest"


def content_digest(arrays: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """SHA-256 of NumPy arrays with their names, types and shapes, and of the options stored with them."""
    digest = hashlib.sha256(json.dumps({**options, CONTENT: None}, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return digest.hexdigest()


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal. Raises `OSError`."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _guard(lines: str) -> str:
    return hashlib.sha256(lines.encode()).hexdigest()
