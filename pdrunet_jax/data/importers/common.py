"""Shared by all importers: mask values of named labels, index masks, dataset.toml."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tomli_w
import tyro

from pdrunet_jax.data.folder import DESCRIPTION, some
from pdrunet_jax.data.labelme.read import IGNORE_LABEL
from pdrunet_jax.data.masks import BACKGROUND, IGNORE
from pdrunet_jax.data.overlay import index_mask
from pdrunet_jax.runtime.errors import UserError

Source = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
Target = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]


@dataclass(frozen=True)
class LabelTable:
    """The mask value of each label."""

    index_of: dict[str, int]
    """Mask value of each label: 0 for background, `IGNORE` for ignored regions."""
    classes: dict[str, int]
    """The dataset's classes with their mask values."""
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def label_table(found: Mapping[str, Sequence[str]], declared: Mapping[str, int]) -> LabelTable:
    """Number the labels `found` (each with its files) as `declared`, or in alphabetical order."""
    special = {BACKGROUND: 0, "_background_": 0, IGNORE_LABEL: IGNORE}  # never a class; the last two are LabelMe's own
    named = {label: value for label, value in declared.items() if value not in (0, IGNORE)}
    labels = sorted(label for label in found if label not in special and label not in declared)
    notes, problems = [], []
    if not declared:
        named = {label: value for value, label in enumerate(labels, start=1)}
        words = " ".join(f"{label} {value}" for label, value in named.items())
        notes.append(f"without --classes, labels are numbered alphabetically, as by --classes {words}")
        if len(named) >= IGNORE:
            problems.append(f"{len(named)} different labels; at most {IGNORE - 1} classes fit a mask")
    else:
        for label in labels:
            close = difflib.get_close_matches(label, declared, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            problems.append(f'label "{label}" (in {some(found[label])}) is not declared{hint}')
        if labels:
            words = ", ".join(f"{label} {value}" for label, value in declared.items())
            problems.append(f"--classes declares {words}; add the labels above, with value 0 for background")
        absent = [label for label in named if label not in found]
        if absent:
            notes.append(f"declared, but in no file: {', '.join(absent)}")
    first: dict[int, str] = {}
    for label, value in named.items():  # several labels may make up one class, named after the first of them
        if first.setdefault(value, label) != label:
            notes.append(f"label {label} counts as {first[value]}")
    classes = {label: value for value, label in first.items()}
    if not classes and not problems:
        problems.append("no shape with an area has the label of a class")
    return LabelTable(special | named | dict(declared), classes, tuple(notes), tuple(problems))


def check_classes(declared: Mapping[str, int]) -> None:
    """Raise `UserError` unless every value fits an index mask."""
    for label, value in declared.items():
        if not 0 <= value <= IGNORE:
            raise UserError(f"--classes {label} {value}: a class has a value from 1 to 254, background 0, ignore 255")


def write_mask(mask: np.ndarray, path: Path) -> None:
    """Write (H, W) uint8 class indices as a palette PNG, which any viewer shows in colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    index_mask(mask, IGNORE).save(path, format="PNG", optimize=True)


def write_description(
    folder: Path,
    name: str,
    classes: Mapping[str, int | str],
    *,
    ignore: int | str | None = None,
    threshold: int | None = None,
    licence: str | None = None,
) -> None:
    """Write dataset.toml, without what is None."""
    others = {"ignore": ignore, "threshold": threshold, "licence": licence}
    content = {"name": name, "classes": dict(classes)} | {
        key: value for key, value in others.items() if value is not None
    }
    (folder / DESCRIPTION).write_text(tomli_w.dumps(content), encoding="utf-8")
