"""What the files are called that `predict` leaves of an image: NAME and one of these ends.

Which images a command line names, what their results are called, and which of them are one machine's share.
"""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from pdrunet_jax.data.images import SUFFIXES, looks_like_dicom
from pdrunet_jax.runtime.errors import UserError

MASK = "_mask.png"
OVERLAY = "_overlay.png"
PROBABILITY = "_probability.png"
NPZ = "_probability.npz"
CONTOURS = "_contours.csv"
NRRD = "_mask.seg.nrrd"
NIFTI = "_mask.nii.gz"
LABELME = ".json"
LABELME_PICTURE = "_labelme.png"

_OF_CLASS = re.compile(r"_probability_[^.]*\.png$")


def probability_of(label: str) -> str:
    """The end of the name of one class's probability, where there are several."""
    safe = "".join(character if character.isalnum() or character in "-_" else "_" for character in label)
    return f"_probability_{safe}.png"


def beside(target: Path, end: str) -> Path:
    """The file of a result: `target` with `end` appended to its name."""
    return target.with_name(target.name + end)


def is_picture(name: str) -> bool:
    """Whether `predict` calls pictures so that it writes."""
    return name.endswith((MASK, OVERLAY, PROBABILITY, LABELME_PICTURE)) or bool(_OF_CLASS.search(name))


SKIPPED = ("._", ".DS_Store", "__MACOSX")
"""Beginnings of the names of what macOS leaves behind: no images, whatever their extension."""


def find_images(inputs: Iterable[str], output: Path) -> list[Path]:
    """The images that `inputs` name, each once, in order.

    A file is taken whatever its name; in a folder, images are told by their extension, and results of an earlier run
    below `output` are left out. Raises `UserError` that lists every input without an image.
    """
    found: dict[Path, Path] = {}
    empty = []
    for text in inputs:
        path = Path(text)
        places = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(text, recursive=True))]
        images = [image for place in places for image in _images_in(place, output.resolve())]
        if not images:
            empty.append(f"{text}: {'holds no image' if places else 'there is no such file or folder'}")
        for image in images:
            found.setdefault(image.resolve(), image)
    if empty or not found:
        listing = "\n".join(f"  - {problem}" for problem in empty or ["no input was given"])
        raise UserError(f"nothing to segment; images end in {', '.join(sorted(SUFFIXES))}:\n{listing}")
    return list(found.values())


def name_results(paths: Sequence[Path]) -> dict[Path, Path]:
    """For each image the path of its results below the output folder, without suffix; no two are the same.

    It is the path below the images' common folder. Images of one folder that differ only in extension keep it:
    `a.png` and `a.dcm` become `a_png` and `a_dcm`.
    """
    common = Path(os.path.commonpath([path.absolute().parent for path in paths]))
    stems = {path: path.absolute().relative_to(common).with_suffix("") for path in paths}
    # Compared without case: some file systems take A_mask.png and a_mask.png for the same file.
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


def parse_shard(text: str | None) -> tuple[int, int]:
    """(3, 16) for "3/16"; (1, 1), everything, for None. Raises `UserError`."""
    if text is None:
        return 1, 1
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    number, count = (int(part) for part in match.groups()) if match else (0, 0)
    if not 1 <= number <= count:
        raise UserError(f"--shard {text}: give two numbers, as in 3/16 for the third of sixteen")
    return number, count


def take_shard(names: dict[Path, Path], shard: tuple[int, int]) -> dict[Path, Path]:
    """Every image of `name_results` whose turn it is, sorted by name: the same on every machine that sees the same."""
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
        and not any(part.startswith(SKIPPED) for part in path.relative_to(place).parts)
        and not (is_picture(path.name) and path.resolve().is_relative_to(output))
    ]
