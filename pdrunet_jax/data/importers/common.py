"""Shared by all importers: mask values of named labels, index masks, dataset.toml."""

import difflib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tomli_w
import tyro

from pdrunet_jax.data.folder import DESCRIPTION
from pdrunet_jax.data.importers.files import short, writable
from pdrunet_jax.data.labelme.read import IGNORE_LABEL
from pdrunet_jax.data.masks import BACKGROUND, IGNORE, is_background
from pdrunet_jax.data.overlay import index_mask
from pdrunet_jax.data.walk import some
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.files import atomic_write

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
    """Number the labels `found` (each with its files) as `declared`, or in alphabetical order.

    A declaration `CLASS=LABEL,LABEL` joins labels in a class, as does the same value for several labels.
    """
    special = {label: 0 for label in (BACKGROUND, *found) if is_background(label)} | {IGNORE_LABEL: IGNORE}
    value_of, class_of = _joined(found, declared)
    labels = sorted(label for label in found if label not in special and label not in value_of)
    notes: list[str] = []
    problems = [f"label {short(label)} must be printable text" for label in labels if not writable(label)]
    if not declared:
        value_of = {label: value for value, label in enumerate(labels, start=1)}
        class_of = {value: label for label, value in value_of.items()}
        words = " ".join(f"{label} {value}" for label, value in value_of.items())
        notes.append(f"without --classes, labels are numbered alphabetically, as by --classes {words}")
        for same in _same_but_for_case(labels):
            joined = f"{same[0]}={','.join(same)}"
            notes.append(f"warning: {' and '.join(same)} are different classes; --classes {joined} 1 makes them one")
        if len(labels) >= IGNORE:
            problems.append(f"{len(labels)} different labels; at most {IGNORE - 1} classes fit a mask")
    else:
        for label in labels:
            close = difflib.get_close_matches(label, value_of, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            problems.append(f'label "{label}" (in {some(found[label])}) is not declared{hint}')
        if labels:
            words = ", ".join(f"{label} {value}" for label, value in declared.items())
            problems.append(f"--classes declares {words}; add the labels above, with value 0 for background")
    named = {label: value for label, value in value_of.items() if value not in (0, IGNORE)}
    used = {value for label, value in named.items() if label in found}
    absent = [name for value, name in class_of.items() if value not in used]
    if absent:
        notes.append(f"declared, but in no file: {', '.join(absent)}")
    notes += [
        f"label {label} counts as {class_of[value]}" for label, value in named.items() if label != class_of[value]
    ]
    classes = {name: value for value, name in class_of.items()}
    if not classes and not problems:
        problems.append("no shape with an area has the label of a class")
    return LabelTable(special | value_of, classes, tuple(notes), tuple(problems))


def _same_but_for_case(labels: Sequence[str]) -> list[list[str]]:
    """Groups of labels that differ in capitals, blanks and separators alone."""
    groups = defaultdict[str, list[str]](list)
    for label in labels:
        groups[re.sub(r"[\W_]+", "", label).casefold()].append(label)
    return [group for key, group in groups.items() if key and len(group) > 1]


def _joined(found: Mapping[str, Sequence[str]], declared: Mapping[str, int]) -> tuple[dict[str, int], dict[int, str]]:
    """The value of each declared label, and the name of each class by its value."""
    value_of: dict[str, int] = {}
    class_of: dict[int, str] = {}
    for key, value in declared.items():
        name, equals, labels = key.partition("=")
        members = [label.strip() for label in labels.split(",")] if equals and key not in found else [key]
        value_of |= dict.fromkeys(members, value)
        if value not in (0, IGNORE):
            class_of.setdefault(value, name.strip() if members != [key] else key)
            value_of.setdefault(class_of[value], value)
    return value_of, class_of


def check_classes(declared: Mapping[str, int]) -> None:
    """Raise `UserError` unless every value fits an index mask, and every label has one."""
    labels = [part.strip() for key in declared if "=" in key for part in key.partition("=")[2].split(",")]
    for label in dict.fromkeys(labels):
        if not label or labels.count(label) + (label in declared) > 1:
            raise UserError(f'--classes: label "{label}" is {"declared twice" if label else "empty"}')
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
    atomic_write(folder / DESCRIPTION, tomli_w.dumps(content))
