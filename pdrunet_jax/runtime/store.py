"""Store of what a command prepares once and needs at its next start, in the user's cache folder.

An entry is one file with the SHA-256 of its content. Its key must name everything that it depends on. The newest
entries are kept. Without a folder that belongs to the user alone there is no store, and nothing else changes.
"""

import hashlib
import json
import os
import stat
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from pdrunet_jax.runtime.files import atomic_write
from pdrunet_jax.runtime.opening import read_regular

MOST_ENTRIES = 100
_DIGEST = 32  # bytes of SHA-256


def cache_folder() -> Path | None:
    """The folder of this package in the user's cache, which may not exist; None for a user without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pdrunet_jax"
    except RuntimeError:
        return None


def key_of(*parts: Any) -> str:
    """A key for entries that depend on `parts`, JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


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
