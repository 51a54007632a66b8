"""Write X-rays drawn from surfaces as a dataset folder, in each of the project's layouts of masks."""

import csv
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pdrunet_jax.config import DataConfig
from pdrunet_jax.data.importers.common import write_description, write_mask
from pdrunet_jax.data.manifest import write_manifest
from pdrunet_jax.data.phantoms.files import PhantomOptions, assign_splits, check_range, write_phantoms
from pdrunet_jax.data.phantoms.surfaces.bodies import Body, read_bodies
from pdrunet_jax.data.phantoms.surfaces.drawers import Drawers
from pdrunet_jax.data.phantoms.surfaces.drawing import CLASSES, Drawing, body_index, draw_xray
from pdrunet_jax.data.phantoms.surfaces.variations import Variation
from pdrunet_jax.data.phantoms.surfaces.views import VIEWS, View, views_of
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.files import new_folder
from pdrunet_jax.runtime.malloc import cores

DRAWN = "drawn.csv"
"""Table of what each X-ray shows: body, view, and the names of what was drawn."""

PRECEDENCE = ("foot", "pelvis", "fibula", "tibia", "femur", "patella")
"""Order in which bones are painted into one label image: the last one owns the pixels that bones share."""

_BATCH = 64
_FEW = 32  # drawn in this process: others take about a second to start


@dataclass(frozen=True)
class SurfaceOptions(PhantomOptions):
    """Phantoms, or X-rays drawn from surfaces."""

    surfaces: Path | None = None
    """Folder of closed bone surfaces (glTF, PLY, STL, OBJ) to draw from, instead of the made-up limbs."""
    views: tuple[View, ...] = VIEWS
    """With --surfaces: the views to draw."""
    without: tuple[Variation, ...] = ()
    """With --surfaces: what not to vary, to find out what it brings."""
    layers: bool = False
    """With --surfaces: one mask file for each bone, for data.multilabel; silhouettes overlap as bones do."""


def draw_dataset(root: Path, config: DataConfig) -> None:
    """Draw `config.phantoms` images into `root`: from `config.surfaces`, or of made-up limbs. Raises `UserError`."""
    side, count, seed = max(config.height_width), config.phantoms, config.split_seed
    if config.surfaces is None:
        write_phantoms(root, PhantomOptions(count, seed, side))
        return
    surfaces = Path(config.surfaces)
    write_xrays(root, SurfaceOptions(count, seed, training_size(side), surfaces=surfaces, layers=config.multilabel))


def training_size(side: int) -> int:
    """Longest side in pixels at which X-rays are drawn to train at `side` pixels: somewhat larger, as real ones are."""
    return round(1.3 * side)


def write_xrays(root: Path, drawing: SurfaceOptions) -> list[str]:
    """Write X-rays drawn from surfaces as a dataset folder, which appears completely or not at all; returns notes.

    About 60, 20 and 20 % of the bodies are in train, val and test. Raises `UserError` if `root` is not empty or cannot
    be written, if an option is out of range, or if the surfaces cannot be read or used.
    """
    check_range(drawing)
    if drawing.layers and drawing.by_bone:
        raise UserError("--layers and --by-bone: choose one, masks that overlap or one label image")
    assert drawing.surfaces is not None
    bodies = read_bodies(drawing.surfaces)
    for body in bodies:
        if not set(views_of(body)) & set(drawing.views):
            raise UserError(f"--views {' '.join(drawing.views)}: body {body.name} has no bones for any of them")
    names = [name for name in CLASSES if any(bone.name == name for body in bodies for bone in body.bones)]
    with new_folder(root, "X-rays") as folder:
        indices = range(drawing.count)
        patients = [_patient(bodies, index, drawing.seed) for index in indices]
        splits = assign_splits(sorted(set(patients)), drawing.seed)
        options = SurfaceOptions(**{each.name: getattr(drawing, each.name) for each in fields(SurfaceOptions)})
        rows = list(_Writer(bodies, folder, options, names, [splits[patient] for patient in patients]).rows())
        if not drawing.layers:
            write_manifest(
                folder,
                [
                    {"image": row["image"], "mask": row["mask"], "patient": patient, "split": splits[patient]}
                    for row, patient in zip(rows, patients, strict=True)
                ],
            )
        with (folder / DRAWN).open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, ("image", "body", "view", "drawn"), extrasaction="ignore", lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
        classes = {name: value for value, name in enumerate(names, 1)} if drawing.by_bone else dict.fromkeys(names, 255)
        licence = f"Drawn by pdrunet_jax (seed {drawing.seed}) from bone surfaces, whose licence and attribution apply"
        write_description(
            folder, "drawn X-rays", classes if drawing.layers or drawing.by_bone else {"bone": 255}, licence=licence
        )
    few = "fewer than three bodies: each X-ray counts as a patient, and bodies recur in all splits"
    return [f"{len(bodies)} bodies: {', '.join(body.name for body in bodies[:6])}", *([few] if len(bodies) < 3 else [])]


def label_image(masks: dict[str, NDArray[np.bool_]], names: Sequence[str], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """(H, W) One class index a pixel: 1 + the place in `names`; where bones overlap, by `PRECEDENCE`."""
    labels = np.zeros(shape, np.uint8)
    for name in PRECEDENCE:
        if name in masks:
            labels[masks[name]] = 1 + names.index(name)
    return labels


def _patient(bodies: Sequence[Body], index: int, seed: int) -> str:
    name = bodies[body_index(len(bodies), index, seed)].name
    return name if len(bodies) >= 3 else f"{name}_{index:05d}"


@dataclass(frozen=True)
class _Writer:
    """Draws and writes one X-ray after the other."""

    bodies: Sequence[Body]
    folder: Path
    options: SurfaceOptions
    """Of this class itself: a command's own options cannot be sent to another process."""
    names: Sequence[str]
    splits: Sequence[str]

    def row(self, index: int) -> dict[str, str]:
        """Draw and write X-ray number `index`; returns its row in `DRAWN`, with its mask."""
        options = self.options
        drawn = draw_xray(
            self.bodies,
            index,
            seed=options.seed,
            size=options.size,
            difficulty=options.difficulty,
            views=options.views,
            without=options.without,
        )
        return _write_xray(drawn, self.folder, f"xray_{index:05d}", options, self.names, self.splits[index])

    def rows(self) -> Iterator[dict[str, str]]:
        """Draw and write all, in as many processes as there are cores."""
        count = self.options.count
        if count < _FEW or cores() == 1:
            yield from map(self.row, range(count))
            return
        with closing(Drawers(self.row, cores())) as drawers, ThreadPoolExecutor(cores()) as pool:
            for start in range(0, count, _BATCH):  # an interrupt waits for one batch at most
                yield from pool.map(drawers, range(start, min(start + _BATCH, count)))


def _write_xray(
    drawn: Drawing, folder: Path, stem: str, drawing: SurfaceOptions, names: Sequence[str], split: str
) -> dict[str, str]:
    place = f"{split}/" if drawing.layers else ""
    image = f"{place}images/{stem}.{'png' if drawn.quality is None else 'jpg'}"
    mask = f"{place}masks/{stem}.png"
    (folder / image).parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(drawn.image)
    if drawn.quality is None:
        picture.save(folder / image)
    else:
        picture.save(folder / image, quality=drawn.quality)
    shape = drawn.image.shape
    if drawing.layers:
        for name in list(drawn.masks) or names[:1]:
            path = folder / f"{place}masks/{name}/{stem}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            _save(drawn.masks.get(name, np.zeros(shape, np.bool_)), path)
    elif drawing.by_bone:
        write_mask(label_image(drawn.masks, names, shape), folder / mask)
    else:
        (folder / mask).parent.mkdir(parents=True, exist_ok=True)
        _save(np.logical_or.reduce([np.zeros(shape, np.bool_), *drawn.masks.values()]), folder / mask)
    return {"image": image, "mask": mask, "body": drawn.body, "view": drawn.view, "drawn": " ".join(drawn.traits)}


def _save(mask: NDArray[np.bool_], path: Path) -> None:
    Image.fromarray(mask.astype(np.uint8) * np.uint8(255)).save(path)
