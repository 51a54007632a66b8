"""Find the files below a folder: links, litter of operating systems, and what cannot be read.

Every real folder is read once, also if links lead to it again, so that loops of links end. Links to files count under
their own names.
"""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pdrunet_jax.data.dicom import other_content
from pdrunet_jax.data.images import is_image
from pdrunet_jax.runtime.errors import DataError

SYSTEM = "hidden files, system files and thumbnails"
SEEN = "links to folders that are read already, or to a folder above"
OTHER = "files that are not images by their extension or content"

RESULT = re.compile(r"_(mask|overlay|labelme|probability(_[^.]*)?)\.png$")
"""Names of the pictures that the predict command writes."""

_LITTER = frozenset(
    {"__macosx", "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r", "lost+found"}
    | {"@eadir", "@__thumb", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot"}  # storage boxes
    | {"$recycle.bin", "system volume information"}
)


@dataclass
class Found:
    """The files below a folder, sorted by path."""

    files: list[Path] = field(default_factory=list)
    passed: dict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))
    """What is not among `files`, by kind."""
    problems: list[tuple[Path, str]] = field(default_factory=list)
    """What cannot be read, with the reason."""


def walk(folder: Path) -> Found:
    """Find the files below `folder`, litter excluded."""
    found, real = Found(), folder.resolve()
    above = {_identity(parent) for parent in real.parents}  # a link to them would lead to everything else
    seen = set(above)
    pending = [(folder, True)]
    while pending:
        path, is_folder = pending.pop()
        if path != folder and is_litter(path.name):
            found.passed[SYSTEM].append(path)
            continue
        try:
            path.name.encode()
            if not is_folder:
                found.files.append(path)
                continue
            if (identity := _identity(path)) in seen:
                found.passed[SEEN].append(path)
                continue
            seen.add(identity)
            with os.scandir(path) as entries:
                inside = sorted(((Path(entry.path), entry.is_dir()) for entry in entries), reverse=True)
            pending += inside
        except OSError as error:
            found.problems.append((path, error.strerror or str(error)))
        except UnicodeEncodeError:
            found.problems.append((path, "the name is not UTF-8; rename it"))
    return found


def walk_images(folder: Path) -> Found:
    """Find the images below `folder`, by extension or content, DICOM files of other contents excluded."""
    found = walk(folder)
    files, found.files = found.files, []
    for path in files:
        if not is_image(path):
            found.passed[OTHER].append(path)
        elif (content := other_content(path)) is not None:
            found.passed[f"DICOM files that hold no image but {content}"].append(path)
        else:
            found.files.append(path)
    return found


def files_below(folder: Path) -> Iterator[Path]:
    """Files below `folder`, sorted by path, without litter. Raises `DataError` for what cannot be read."""
    found = walk(folder)
    if found.problems:
        raise DataError(f"{folder}: unreadable", [f"{path}: {reason}" for path, reason in found.problems])
    yield from found.files


def passed_over(passed: Mapping[str, Sequence[Path]], name: Callable[[Path], str] = str) -> list[str]:
    """A line for each kind of `Found.passed`, with what `name` calls its files."""
    return [
        f"passed over: {kind} ({len(paths)}): {some(list(map(name, paths)))}" for kind, paths in passed.items() if paths
    ]


def is_litter(name: str) -> bool:
    """Whether a file or folder is hidden, or left behind by an operating system or a storage box."""
    return name.startswith(".") or name.lower() in _LITTER


def some(names: Sequence[str], most: int = 5) -> str:
    """The first few of `names`, and the number of the others."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _identity(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino
