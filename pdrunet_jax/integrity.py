"""Digests that show whether a folder is still what was written: a checkpoint counts only with a digest that matches.

The digest file is in the form of `sha256sum` (`sha256sum -c digest.sha256` checks it by hand) with one comment line
that guards the list itself.
"""

import hashlib
from pathlib import Path

from pdrunet_jax.files import atomic_write, sync

DIGEST = "digest.sha256"
_GUARD = "# sha256 of the lines above: "


def seal(folder: Path) -> None:
    """Bring every file of `folder` to the disk, then write their digests beside them, as the last thing.

    Raises `OSError` if the disk refuses.
    """
    for path in sorted(folder.rglob("*"), reverse=True):  # files and subfolders before the folder that names them
        sync(path)
    lines = "".join(f"{_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in _files(folder))
    atomic_write(folder / DIGEST, f"{lines}{_GUARD}{_guard(lines)}\n")


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder, in a few words, or None if it is bit for bit what was sealed."""
    try:
        text = (folder / DIGEST).read_bytes().decode()
    except FileNotFoundError:
        return "it is empty" if not any(folder.iterdir()) else f"{DIGEST} is missing"
    except (OSError, UnicodeDecodeError) as error:
        return f"{DIGEST} cannot be read ({error})"
    lines, _, guard = text.rpartition(_GUARD)
    if not lines or guard != f"{_guard(lines)}\n":
        return f"{DIGEST} itself is damaged"
    for line in lines.splitlines():
        digest, _, name = line.partition("  ")
        try:
            found = _sha256(folder / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found != digest:
            return f"{name} is not what was written"
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / DIGEST)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _guard(lines: str) -> str:
    return hashlib.sha256(lines.encode()).hexdigest()
