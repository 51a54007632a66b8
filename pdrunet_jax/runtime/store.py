"""Store of what a command prepares once and needs at its next start, in the user's cache folder.

An entry is one file with the SHA-256 of its content. Its key must name everything that it depends on. The newest
entries are kept. Without a folder that belongs to the user alone there is no store, and nothing else changes.
"""

import hashlib
import json
import os
import platform
import stat
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pdrunet_jax
from pdrunet_jax.runtime.files import atomic_write
from pdrunet_jax.runtime.malloc import cores
from pdrunet_jax.runtime.opening import read_regular

MOST_ENTRIES = 100
_DIGEST = 32  # bytes of SHA-256
_CODE = (".py", ".cc")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "onnx")


def cache_folder() -> Path | None:
    """The folder of this package in the user's cache, which may not exist; None for a user without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pdrunet_jax"
    except RuntimeError:
        return None


def key_of(*parts: Any) -> str:
    """A key for entries that depend on `parts`, JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@cache
def versions(*code: str) -> list[str]:
    """Versions of everything that computes: of Python, packages and, by its digest, our own code.

    `code` names the files and folders of this package that matter; without names, all do.
    """
    root = Path(pdrunet_jax.__file__).parent
    named = [root / name for name in code] or [root]
    files = [file for each in named for file in (each.rglob("*") if each.is_dir() else [each]) if file.suffix in _CODE]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.read_bytes())
    installed = []
    for name in _PACKAGES:
        try:
            installed.append(metadata.version(name))
        except metadata.PackageNotFoundError:
            installed.append("")
    return [digest.hexdigest(), platform.python_version(), platform.machine(), *installed]


def program_key(code: Sequence[str], *about: Any) -> str:
    """The key of a traced program, which also depends on the settings of JAX and on the cores; `code` as in `versions`.

    `about` are JSON values, and must decide everything else, such as the shapes of the arguments.
    """
    settings = {name: value for name, value in os.environ.items() if name.startswith(("JAX_", "XLA_"))}
    return key_of(versions(*code), settings, cores(), *about)


def read_entry(kind: str, key: str) -> bytes | None:
    """The content of an entry; None if there is none. A damaged one is removed, with a warning."""
    path = _path(kind, key)
    try:
        data = read_regular(path) if path else b""
    except OSError:
        return None
    if path is None or not data:
        return None
    if hashlib.sha256(data[_DIGEST:]).digest() == data[:_DIGEST]:
        with suppress(OSError):
            os.utime(path)  # the oldest entries are removed
        return data[_DIGEST:]
    discard_entry(kind, key, "its content is not what was written")
    return None


def write_entry(kind: str, key: str, content: bytes) -> None:
    """Keep `content`, unless the folder cannot be written."""
    if (path := _path(kind, key)) is None:
        return
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        atomic_write(path, hashlib.sha256(content).digest() + content)
        entries = sorted(path.parent.iterdir(), key=lambda entry: entry.stat().st_mtime_ns)
        for entry in entries[:-MOST_ENTRIES]:
            entry.unlink()


def discard_entry(kind: str, key: str, reason: str) -> None:
    """Remove an entry that is of no use, with a warning that says why."""
    if path := _path(kind, key):
        print(f"warning: {path} is removed and made again: {reason}", file=sys.stderr)
        with suppress(OSError):
            path.unlink()


def _path(kind: str, key: str) -> Path | None:
    folder = cache_folder()
    if folder is None:
        return None
    folder = folder / "prepared"
    with suppress(OSError):
        status = folder.stat()
        others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if status.st_uid != os.getuid() or others:  # programs that somebody else may have written are not run
            return None
    return folder / f"{kind}-{key}"
