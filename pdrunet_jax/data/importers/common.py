"""What all importers share: a dataset folder that appears whole or not at all, and the classes of named shapes."""

import csv
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tomli_w
from PIL import Image

from pdrunet_jax.data.folder import MANIFEST, some
from pdrunet_jax.data.labelme.read import IGNORE_LABEL
from pdrunet_jax.data.masks import BACKGROUND, IGNORE
from pdrunet_jax.runtime.errors import UserError

BACKGROUND_LABELS = (BACKGROUND, "_background_")
"""Labels that are no class, whatever is declared; the second is LabelMe's own."""

_COLOURS = ((0, 0, 0), (230, 60, 50), (60, 180, 75), (70, 110, 235), (250, 190, 40), (160, 70, 200), (60, 200, 210))


@dataclass(frozen=True)
class LabelTable:
    """What becomes of each label."""

    index_of: dict[str, int]
    """The mask value of each label: 0 for background, `IGNORE` for what is left out."""
    classes: dict[str, int]
    """The dataset's classes with their mask values."""
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def label_table(found: Mapping[str, Sequence[str]], declared: Mapping[str, int]) -> LabelTable:
    """Classes for the labels `found` (each with the files that have it), numbered by `declared`, or by their names."""
    special = dict.fromkeys(BACKGROUND_LABELS, 0) | {IGNORE_LABEL: IGNORE}
    named = {label: value for label, value in declared.items() if value not in (0, IGNORE)}
    labels = sorted(label for label in found if label not in special and label not in declared)
    notes, problems = [], []
    if not declared:
        named = {label: value for value, label in enumerate(labels, start=1)}
        words = " ".join(f"{label} {value}" for label, value in named.items())
        notes.append(f"no --classes were given: the labels in the order of their names are --classes {words}")
        if len(named) >= IGNORE:
            problems.append(f"{len(named)} different labels; at most {IGNORE - 1} classes fit a mask")
    else:
        for label in labels:
            close = difflib.get_close_matches(label, declared, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            problems.append(f'label "{label}" (in {some(found[label])}) is not declared{hint}')
        if labels:
            words = ", ".join(f"{label} {value}" for label, value in declared.items())
            problems.append(f"--classes declares {words}; add the labels above, with value 0 what is background")
        absent = [label for label in named if label not in found]
        if absent:
            notes.append(f"declared, but in no file: {', '.join(absent)}")
    classes: dict[str, int] = {}
    for label, value in named.items():
        if value in classes.values():  # several labels that are one class; it goes by the first of them
            first = next(name for name, other in classes.items() if other == value)
            notes.append(f"label {label} counts as {first}")
        else:
            classes[label] = value
    if not classes and not problems:
        problems.append("no shape with an area has a label that is a class")
    return LabelTable(special | named | dict(declared), classes, tuple(notes), tuple(problems))


def check_classes(declared: Mapping[str, int]) -> None:
    """Raise `UserError` unless every value fits an index mask."""
    for label, value in declared.items():
        if not 0 <= value <= IGNORE:
            raise UserError(f"--classes {label} {value}: a class has a value from 1 to 254, background 0, ignore 255")


def save_index_mask(mask: np.ndarray, path: Path) -> None:
    """Write (H, W) uint8 class indices as a palette PNG, so that any viewer shows them in colours."""
    palette = [_COLOURS[1 + (value - 1) % (len(_COLOURS) - 1)] for value in range(1, 256)]
    image = Image.fromarray(mask)
    image.putpalette([part for colour in (_COLOURS[0], *palette[:-1], (255, 255, 255)) for part in colour])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, format="PNG", optimize=True)


def write_manifest(folder: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write manifest.csv with the columns of the first row."""
    with (folder / MANIFEST).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_description(
    folder: Path, name: str, classes: Mapping[str, int], *, ignore: bool, licence: str | None = None
) -> None:
    """Write dataset.toml."""
    content: dict[str, object] = {"name": name, "classes": dict(classes)}
    content |= {"ignore": IGNORE} if ignore else {}
    content |= {"licence": licence} if licence else {}
    (folder / "dataset.toml").write_text(tomli_w.dumps(content), encoding="utf-8")
