"""Input images of the predict command: find them, name their results, split them between machines."""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from pdrunet_jax.data.images import SUFFIXES, looks_like_dicom
from pdrunet_jax.runtime.errors import DataError, UserError

_RESULT = re.compile(r"_(mask|overlay|labelme|probability(_[^.]*)?)\.png$")  # pictures that the command itself writes
_MACOS_FILES = ("._", ".DS_Store", "__MACOSX")  # name prefixes of macOS metadata, skipped whatever the extension


def find_images(inputs: Iterable[str], output: Path) -> list[Path]:
    """Images named by files, folders and glob patterns, each once, in order.

    A file is accepted whatever its name. In folders images are recognised by extension, and results of an earlier run
    below `output` are skipped. Raises `UserError` that lists every input without an image.
    """
    found: dict[Path, Path] = {}
    empty = []
    for text in inputs:
        path = Path(text)
        places = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(text, recursive=True))]
        images = [image for place in places for image in _images_in(place, output.resolve())]
        if not images:
            empty.append(f"{text}: {'contains no image' if places else 'no such file or folder'}")
        for image in images:
            found.setdefault(image.resolve(), image)
    if empty or not found:
        what = f"nothing to segment; supported extensions are {', '.join(sorted(SUFFIXES))}"
        raise DataError(what, empty or ["no input was given"])
    return list(found.values())


def name_results(paths: Sequence[Path]) -> dict[Path, Path]:
    """Map each image to a unique path for its results, relative to the output folder and without suffix.

    It is the image's path below the images' common folder. Images in one folder that differ only in extension keep it:
    `a.png` and `a.dcm` become `a_png` and `a_dcm`.
    """
    common = Path(os.path.commonpath([path.absolute().parent for path in paths]))
    stems = {path: path.absolute().relative_to(common).with_suffix("") for path in paths}
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
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    number, count = (int(part) for part in match.groups()) if match else (0, 0)
    if not 1 <= number <= count:
        raise UserError(f"--shard {text}: give K/N with K from 1 to N, such as 3/16")
    return number, count


def take_shard(names: dict[Path, Path], shard: tuple[int, int]) -> dict[Path, Path]:
    """The K-th of N shards of `name_results`, sorted by name, so that every machine sees the same split."""
    number, count = shard
    ordered = sorted(names.items(), key=lambda item: item[1].as_posix())
    return dict(ordered[number - 1 :: count])


def is_dicom(path: Path) -> bool:
    """Whether `read_image` reads the file as DICOM. Raises `OSError` if it cannot be opened."""
    with path.open("rb") as file:
        return looks_like_dicom(file.read(132), path.name)


def _images_in(place: Path, output: Path) -> list[Path]:
    if place.is_file():
        return [place]
    return [
        path
        for path in sorted(place.rglob("*"))
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(_MACOS_FILES) for part in path.relative_to(place).parts)
        and not (_RESULT.search(path.name) and path.resolve().is_relative_to(output))
    ]
