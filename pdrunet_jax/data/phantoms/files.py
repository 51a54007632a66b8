"""Write phantoms as a dataset folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pdrunet_jax.data.importers.common import write_description, write_mask
from pdrunet_jax.data.manifest import write_manifest
from pdrunet_jax.data.phantoms.anatomy import BONES
from pdrunet_jax.data.phantoms.phantom import Difficulty, draw, generator
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.files import new_folder

SMALLEST = 32
"""Smallest side in pixels at which a bone is still recognisable."""

_SPLIT = 2  # stream of random numbers; phantom.py has the others

MOST_COUNT, MOST_SIZE = 100_000, 8192
"""Largest number of phantoms, and their largest side in pixels."""


@dataclass(frozen=True)
class PhantomOptions:
    """Number, look and file format of phantoms."""

    count: int = 120
    """Number of images."""
    seed: int = 0
    """Seed of the random scenes."""
    size: int = 256
    """Height and width in pixels; with --surfaces, the longest side."""
    difficulty: Difficulty = "standard"
    """easy: dense bones and little noise; hard: faint bones, more noise and scatter, casts, metal, wires."""
    by_bone: bool = False
    """One class for each bone (femur, tibia, fibula, humerus and so on), instead of the class bone."""


def write_phantoms(root: Path, drawing: PhantomOptions) -> None:
    """Write phantoms as a dataset folder: images, masks, manifest.csv, dataset.toml.

    About 60, 20 and 20 % of the patients are in train, val and test. The folder appears completely or not at all.
    Raises `UserError` if `root` is not empty or cannot be written, or if count, size or seed is out of range.
    """
    check_range(drawing)
    with new_folder(root, "phantoms") as folder:
        for name in ("images", "masks"):
            (folder / name).mkdir()
        rows = [_write_phantom(index, folder, drawing) for index in range(drawing.count)]
        splits = assign_splits(sorted({row["patient"] for row in rows}), drawing.seed)
        write_manifest(folder, [{**row, "split": splits[row["patient"]]} for row in rows])
        # Long bones only: ribs, wrist and ankle bones, metal and markers are background.
        classes = {name: value for value, name in enumerate(BONES, start=1)} if drawing.by_bone else {"bone": 255}
        licence = f"Synthetic: drawn by pdrunet_jax (seed {drawing.seed}); no rights reserved, no patients"
        write_description(folder, "phantoms", classes, licence=licence)


def check_range(drawing: PhantomOptions) -> None:
    """Raise `UserError` if count, size or seed is out of range."""
    if drawing.count < 1:
        raise UserError(f"--count {drawing.count}: ask for at least one phantom")
    if drawing.size < SMALLEST:
        raise UserError(f"--size {drawing.size}: phantoms need at least {SMALLEST} pixels to show bones")
    if drawing.count > MOST_COUNT or drawing.size > MOST_SIZE:
        raise UserError(f"--count {drawing.count} --size {drawing.size}: at most {MOST_COUNT} and {MOST_SIZE}")
    if not 0 <= drawing.seed < 1 << 64:
        raise UserError(f"--seed {drawing.seed}: give a number from 0 to {(1 << 64) - 1}")


def _write_phantom(index: int, folder: Path, drawing: PhantomOptions) -> dict[str, str]:
    """Write the image and the mask of a phantom; returns the manifest's row without the split."""
    phantom = draw(index, seed=drawing.seed, size=drawing.size, difficulty=drawing.difficulty)
    image, mask = (f"{kind}/phantom_{index:05d}.png" for kind in ("images", "masks"))
    Image.fromarray(phantom.image).save(folder / image)
    if drawing.by_bone:
        write_mask(phantom.bones, folder / mask)
    else:
        Image.fromarray(phantom.mask * np.uint8(255)).save(folder / mask)
    return {"image": image, "mask": mask, "patient": phantom.patient}


def assign_splits(patients: Sequence[str], seed: int) -> dict[str, str]:
    """Draw a split for each patient; val and test get at least one each if there are three patients.

    Simpler than `split.assign` and kept as it is: published scores refer to this split.
    """
    order = generator(seed, _SPLIT, 0).permutation(len(patients))
    share = max(1, round(0.2 * len(patients))) if len(patients) >= 3 else 0
    names = ["val"] * share + ["test"] * share + ["train"] * (len(patients) - 2 * share)
    return {patients[place]: name for place, name in zip(order.tolist(), names, strict=True)}
