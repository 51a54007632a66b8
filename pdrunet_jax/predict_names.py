"""What the files are called that `predict` leaves of an image: NAME and one of these ends."""

import re
from pathlib import Path

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
