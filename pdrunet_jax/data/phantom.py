"""Synthetic X-rays of long bones with exact masks, drawn from a seed: practice data that anyone may have.

Everything depends on the seed and the picture's index alone, so pictures can be drawn in any order, in any number.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pdrunet_jax.data.phantom_anatomy import draw_limb
from pdrunet_jax.data.phantom_radiograph import radiograph
from pdrunet_jax.errors import UserError
from pdrunet_jax.files import new_folder

SMALLEST = 32
"""Side, in pixels, below which a bone is no longer recognisable."""

_LIMB, _PICTURE, _SPLIT = range(3)  # independent streams of random numbers

_TOML = """\
name = "phantoms"
classes = {{ bone = 255 }}  # long bones; ribs, wrist and ankle bones, metal and markers are background
licence = "Synthetic: drawn by pdrunet_jax (seed {seed}); free of rights and of patients"
"""


@dataclass(frozen=True)
class Phantom:
    """A synthetic radiograph."""

    image: NDArray[np.uint8]
    """(H, W), 0 to 255."""
    mask: NDArray[np.uint8]
    """(H, W) class indices: 1 inside long bones, else 0."""
    patient: str


def draw(index: int, *, seed: int = 0, size: int = 256) -> Phantom:
    """Phantom number `index` of `seed`, (size, size) pixels.

    The same arguments give the same bits on the same kind of processor with the same NumPy and SciPy. Of every three
    phantoms the first two are views of one patient's limb.
    """
    patient = index // 3 * 2 + (index % 3 == 2)
    limb = draw_limb(_generator(seed, _LIMB, patient))
    image, mask = radiograph(limb, _generator(seed, _PICTURE, index), size)
    return Phantom(image, mask, f"p{patient:05d}")


def write_dataset(root: Path, count: int, seed: int = 0, size: int = 256) -> None:
    """Write `count` phantoms as a dataset folder: images, masks (0 and 255), manifest.csv and dataset.toml.

    About 60, 20 and 20 % of the patients train, validate and test. The folder appears complete or not at all. Raises
    `UserError` if `root` holds something already or cannot be written, or if there is nothing sensible to draw.
    """
    root = Path(root)
    if count < 1:
        raise UserError(f"{count} phantoms cannot be drawn; ask for at least one")
    if size < SMALLEST:
        raise UserError(f"phantoms of {size} pixels show nothing; ask for at least {SMALLEST}")
    with new_folder(root, "phantoms") as folder:
        _write_files(folder, count, seed, size)


def _generator(seed: int, stream: int, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, stream, number))))


def _write_files(folder: Path, count: int, seed: int, size: int) -> None:
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    rows = []
    for index in range(count):
        phantom = draw(index, seed=seed, size=size)
        image, mask = f"images/phantom_{index:05d}.png", f"masks/phantom_{index:05d}.png"
        Image.fromarray(phantom.image).save(folder / image)
        Image.fromarray(phantom.mask * np.uint8(255)).save(folder / mask)
        rows.append((image, mask, phantom.patient))
    splits = _splits(sorted({patient for _, _, patient in rows}), seed)
    with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("image", "mask", "patient", "split"))
        writer.writerows((image, mask, patient, splits[patient]) for image, mask, patient in rows)
    (folder / "dataset.toml").write_text(_TOML.format(seed=seed), encoding="utf-8")


def _splits(patients: Sequence[str], seed: int) -> dict[str, str]:
    """A split for each patient; validation and test get one each as soon as there are three."""
    order = _generator(seed, _SPLIT, 0).permutation(len(patients))
    share = max(1, round(0.2 * len(patients))) if len(patients) >= 3 else 0
    names = ["val"] * share + ["test"] * share + ["train"] * (len(patients) - 2 * share)
    return {patients[place]: name for place, name in zip(order.tolist(), names, strict=True)}
