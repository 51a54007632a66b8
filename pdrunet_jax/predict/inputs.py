"""Input images of the predict command: find them, name their results, split them between machines."""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from pdrunet_jax.data.images import FORMATS, stem
from pdrunet_jax.data.manifest import decode_text
from pdrunet_jax.data.walk import RESULT, Found, is_litter, passed_over, walk_images
from pdrunet_jax.predict.outputs import MASK, with_suffix
from pdrunet_jax.predict.resume import read_record
from pdrunet_jax.runtime.errors import DataError, UserError
from pdrunet_jax.runtime.opening import read_regular

_EARLIER = "results of earlier predictions"
_HINTS = {
    "-": "images are not read from standard input; name files",
    ".zip": "an archive; unpack it and name the folder",
    ".tar": "an archive; unpack it and name the folder",
    ".gz": "a compressed file; unpack it first",
    ".7z": "an archive; unpack it and name the folder",
    ".rar": "an archive; unpack it and name the folder",
    ".tgz": "an archive; unpack it and name the folder",
    **dict.fromkeys((".nii", ".nii.gz", ".nrrd", ".mha", ".mhd"), "a volume; save its slice as PNG or DICOM"),
    ".txt": "a text; if it lists images, one a line, write @{}",
    ".csv": "a table; to name images in a text file, one a line, write @FILE",
}
"""What cannot be an image, by its extension."""


@dataclass
class Inputs:
    """The images to segment, each once, in order."""

    images: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Folders that cannot be read, with the reason."""
    remarks: list[str] = field(default_factory=list)
    """What was passed over, a line for each kind."""


def find_images(inputs: Iterable[str], output: Path) -> Inputs:
    """Images named by files, folders, glob patterns, and lists of them (`@FILE`, one a line).

    A file is accepted whatever its name. In folders images are recognised by extension or content; results of earlier
    runs are passed over. Raises `DataError` that lists every input without an image.
    """
    every: dict[Path, Path] = {}
    found, empty = Found(), []
    for text in _listed(inputs):
        path = Path(text)
        if not text:  # the current folder, for pathlib
            empty.append('"": an empty name; is a variable of the shell unset?')
            continue
        endings = text, "".join(path.suffixes[-2:]).lower(), path.suffix.lower()
        hint = next((_HINTS[ending] for ending in endings if ending in _HINTS), None)
        if "://" in text:
            hint = "a web address; download the file and name it"
        if hint and not path.is_dir():
            empty.append(f"{text}: {hint.format(text)}")
            continue
        if path.is_dir():
            images = _images_in(path, output.resolve(), found)
        else:
            images = [path] if os.path.lexists(path) else list(_matching(text, output.resolve(), found))
        if not images and not found.problems:
            empty.append(f"{text}: {'contains no image' if path.is_dir() else 'no such file or folder'}")
        for image in images:
            every.setdefault(image.parent.resolve() / image.name, image)
    for result in {result for path in every for result in _results_of(path)} & every.keys():
        found.passed[_EARLIER].append(every.pop(result))
    problems = [f"{path}: {reason}" for path, reason in found.problems]
    if empty or not every:
        remarks = passed_over(found.passed) if not every else []
        what = f"nothing to segment; images are {FORMATS} files"
        raise DataError(what, [*empty, *problems, *remarks] or ["no input was given"])
    return Inputs(list(every.values()), problems, passed_over(found.passed))


def name_results(paths: Sequence[Path]) -> dict[Path, Path]:
    """Map each image to a unique path for its results, relative to the output folder and without suffix.

    It is the image's path below the images' common folder. Images in one folder that differ only in extension keep it:
    `a.png` and `a.dcm` become `a_png` and `a_dcm`.
    """
    common = Path(os.path.commonpath([path.absolute().parent for path in paths]))
    below = {path: path.absolute().relative_to(common) for path in paths}
    stems = {path: name.with_name(stem(name.name)) for path, name in below.items()}
    # Compared without case: some file systems do not distinguish A_mask.png from a_mask.png.
    uses = Counter(str(stem).lower() for stem in stems.values())
    names = {
        path: stem.with_name(path.name.replace(".", "_")) if uses[str(stem).lower()] > 1 else stem
        for path, stem in stems.items()
    }
    taken: set[str] = set()
    for path, name in names.items():
        number = 2
        while str(names[path]).lower() in taken:
            names[path] = name.with_name(f"{name.name}_{number}")
            number += 1
        taken.add(str(names[path]).lower())
    return names


def parse_shard(text: str) -> tuple[int, int]:
    """(3, 16) for "3/16". Raises `UserError`."""
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    number, count = (int(part) for part in match.groups()) if match else (0, 0)
    if not 1 <= number <= count:
        raise UserError(f"--shard {text}: give K/N with K from 1 to N, such as 3/16")
    return number, count


def take_shard(names: dict[Path, Path], shard: tuple[int, int]) -> dict[Path, Path]:
    """The K-th of N shards of `name_results`, sorted by name, so that every machine sees the same split."""
    number, count = shard
    ordered = sorted(names.items(), key=lambda item: item[1].as_posix())
    return dict(ordered[number - 1 :: count])


def _listed(inputs: Iterable[str]) -> Iterator[str]:
    """The inputs, with the lines of each `@FILE` in its place."""
    for text in inputs:
        if not text.startswith("@") or os.path.lexists(text):
            yield text
            continue
        try:
            lines = decode_text(read_regular(Path(text[1:])))[0].splitlines()
        except OSError as error:
            raise UserError(f"{text}: {error.strerror or error}") from None
        except ValueError as error:
            raise UserError(f"{text}: {error}; list one image a line") from None
        yield from (name for line in lines if (name := line.strip().strip('"')))


def _matching(pattern: str, output: Path, found: Found) -> Iterator[Path]:
    """Images that match a glob pattern; with `**`, links are followed as in folders, so that loops end."""
    if "**" not in pattern:
        for match in sorted(glob.glob(pattern)):
            if Path(match).is_dir():
                yield from _images_in(Path(match), output, found)
            elif not is_litter(Path(match).name):
                yield Path(match)
        return
    parts = Path(pattern).parts
    start = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    base = Path(*parts[:start])
    if base.is_dir():
        for path in _images_in(base, output, found):
            if _fits(path.relative_to(base).parts, parts[start:]):
                yield path


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path, or a folder that it is in, matches a glob pattern."""
    if not pattern:
        return True
    if pattern[0] == "**":
        return any(_fits(parts[index:], pattern[1:]) for index in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def _images_in(place: Path, output: Path, found: Found) -> list[Path]:
    """Images below a folder; what is passed over is added to `found`."""
    here = walk_images(place)
    for kind, paths in here.passed.items():
        found.passed[kind] += paths
    found.problems += here.problems
    written = {path for path in here.files if RESULT.search(path.name) and path.resolve().is_relative_to(output)}
    found.passed[_EARLIER] += sorted(written)
    return [path for path in here.files if path not in written]


def _results_of(mask: Path) -> Iterator[Path]:
    """The mask and the other files of an earlier result, by its record; nothing for other files."""
    if mask.name.endswith(MASK):
        target = mask.with_name(mask.name.removesuffix(MASK))
        if (record := read_record(target)) is not None:
            yield from (with_suffix(target, suffix) for suffix in (MASK, *record["files"]))
