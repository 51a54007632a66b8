"""Dataset folders: the description, the manifest or layout, and the pairing of images with masks by name."""

import csv
import difflib
import io
import json
import os
import posixpath
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from pdrunet_jax.config import DataConfig
from pdrunet_jax.data.images import SUFFIXES
from pdrunet_jax.data.masks import MaskCoding, declare
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.files import atomic_write

DESCRIPTION = "dataset.toml"
NNUNET = "dataset.json"
MANIFEST = "manifest.csv"
SPLIT_FOLDERS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
"""The splits, each with the names accepted for it."""

_KEYS = ("name", "classes", "ignore", "threshold", "spacing", "licence")
_MASK_SUFFIXES = ("_mask", "_seg", "_label")
_JUNK = ("__macosx", "thumbs.db", "desktop.ini")


@dataclass(frozen=True)
class Description:
    """Declarations of a dataset folder; None or empty where absent."""

    name: str | None = None
    classes: Mapping[str, Any] = field(default_factory=dict)
    ignore: Any = None
    threshold: int | None = None
    spacing: tuple[float, float] | None = None
    """(row, column) spacing in mm."""
    source: str = DESCRIPTION
    """Name of the file that declares the classes."""

    def coding(self, config: DataConfig) -> MaskCoding:
        """The mask coding, with the overrides of `config`. Raises `UserError`."""
        classes = config.classes or self.classes
        ignore = self.ignore if config.ignore is None else config.ignore
        source = "data.classes" if config.classes else f"{self.source}: classes"
        return declare(classes, ignore, config.threshold or self.threshold, source)


@dataclass(frozen=True)
class Pair:
    """An image with its mask. `id` is the image's POSIX path below the root, or an absolute path."""

    id: str
    image: Path
    mask_id: str
    mask: Path
    patient: str | None = None
    split: str | None = None


@dataclass
class LayoutResult:
    """The pairs of a dataset folder, and its problems."""

    layout: str = ""
    pairs: list[Pair] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_description(root: Path) -> Description:
    """Read dataset.toml, or dataset.json next to imagesTr/. Raises `UserError` that names the file."""
    if (root / DESCRIPTION).is_file():
        return _from_toml(root / DESCRIPTION)
    if (root / NNUNET).is_file() and (root / "imagesTr").is_dir():
        return _from_nnunet(root / NNUNET)
    return Description()


def find_pairs(root: Path) -> LayoutResult:
    """Pair the images and masks below `root`; `layout` is empty if none is recognised."""
    if (root / MANIFEST).is_file():
        return _from_manifest(root)
    folders = {
        split: folder
        for split, names in SPLIT_FOLDERS.items()
        for folder in names
        if (root / folder / "images").is_dir() or (root / folder / "masks").is_dir()
    }
    found = LayoutResult()
    if folders:
        found.layout = "{train,val,test}/{images,masks}"
        for split, folder in folders.items():
            _pair_folders(root, (f"{folder}/images", f"{folder}/masks"), found, split=split)
    elif (root / "images").is_dir() or (root / "masks").is_dir():
        found.layout = "images/ and masks/"
        _pair_folders(root, ("images", "masks"), found)
    elif (root / "imagesTr").is_dir():
        found.layout = "nnU-Net imagesTr/labelsTr"
        tested = (root / "imagesTs").is_dir() and (root / "labelsTs").is_dir()
        _pair_folders(root, ("imagesTr", "labelsTr"), found, split="train" if tested else None, nnunet=True)
        if tested:
            _pair_folders(root, ("imagesTs", "labelsTs"), found, split="test", nnunet=True)
    return found


def read_manifest(root: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Column names and rows of the manifest. Raises `ValueError` with the reason if it is not a valid table."""
    try:
        text = (root / MANIFEST).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, restval="")
    try:
        rows = [{key: (value or "").strip() for key, value in row.items() if isinstance(key, str)} for row in reader]
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from None
    columns = list(reader.fieldnames or [])
    missing = [column for column in ("image", "mask") if column not in columns]
    if missing:
        raise ValueError(f"no column {' and '.join(missing)}; columns are {', '.join(columns) or 'absent'}")
    return columns, rows


def write_manifest(root: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write the manifest, with the columns of the first row. Raises `OSError`."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(root / MANIFEST, text.getvalue())


def normal_path(path: str) -> str:
    """A manifest's path in normal form, as in `Pair.id`."""
    return posixpath.normpath(path.replace("\\", "/"))


def files_below(folder: Path) -> Iterator[Path]:
    """Files below `folder`, sorted by name, without hidden files and other litter of operating systems."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if path.name.startswith(".") or path.name.lower() in _JUNK:
            continue
        if path.is_dir():
            yield from files_below(path)
        else:
            yield path


def some(names: Sequence[str], most: int = 5) -> str:
    """The first few of `names`, and the number of the others."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _from_toml(path: Path) -> Description:
    try:
        values = tomllib.loads(_text(path))
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:  # a number of thousands of digits, too
        raise UserError(f"{path} is not valid TOML: {error}") from None
    for key in values:
        if key not in _KEYS:
            close = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(_KEYS)}"
            raise UserError(f"{path}: unknown key {key!r}; {hint}")
    if not isinstance(values.get("classes", {}), dict):
        raise UserError(f"{path}: classes must be a table of names and values, such as {{ bone = 255 }}")
    threshold = values.get("threshold")
    if threshold is not None and (type(threshold) is not int or not 0 < threshold < 256):
        raise UserError(f"{path}: threshold = {threshold!r} must be a grey value from 1 to 255")
    name = None if values.get("name") is None else str(values["name"])
    spacing = _spacing(values.get("spacing"), path)
    return Description(name, values.get("classes", {}), values.get("ignore"), threshold, spacing)


def _from_nnunet(path: Path) -> Description:
    """Read `labels` of either nnU-Net version: names to values, or values to names; "ignore" is not a class."""
    try:
        values = json.loads(_text(path))
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    labels = values.get("labels", {}) if isinstance(values, dict) else None
    if not isinstance(labels, dict):
        raise UserError(f"{path}: labels must be an object of names and values")
    if labels and all(isinstance(name, str) and value.isdecimal() for value, name in labels.items()):
        labels = {name: int(value) if len(value) < 10 else value for value, name in labels.items()}
    ignore = labels.pop("ignore", None)
    name = values.get("name")
    return Description(str(name) if isinstance(name, str) else None, labels, ignore, source=NNUNET)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _spacing(value: Any, path: Path) -> tuple[float, float] | None:
    if value is None:
        return None
    values = value if isinstance(value, list) else [value, value]
    if len(values) != 2 or not all(type(item) in (int, float) and 0 < item < 1e6 for item in values):
        raise UserError(f"{path}: spacing = {value!r} must be a number of mm, or [rows, columns]")
    return float(values[0]), float(values[1])


def _from_manifest(root: Path) -> LayoutResult:
    found = LayoutResult(layout=MANIFEST)
    try:
        columns, rows = read_manifest(root)
    except ValueError as error:
        found.problems.append(f"{MANIFEST}: {error}")
        return found
    seen: dict[str, int] = {}
    outside = 0
    for line, row in enumerate(rows, start=2):
        where = f"{MANIFEST} line {line}"
        paths = {}
        for kind in ("image", "mask"):
            reason = _refused(row[kind], absolute=kind == "image")
            path = normal_path(row[kind])
            if reason:
                found.problems.append(f"{where}: {kind} {row[kind] or 'path'} {reason}")
            elif not os.path.isfile(root / path):  # unlike Path.is_file, accepts any text
                found.problems.append(f"{where}: {kind} {row[kind]} does not exist")
            else:
                paths[kind] = path
        split = next((split for split, names in SPLIT_FOLDERS.items() if row.get("split", "").lower() in names), None)
        if "split" in columns and split is None:
            found.problems.append(f'{where}: split "{row["split"]}" is not train, val or test')
        if "patient" in columns and not row["patient"]:
            found.problems.append(f"{where}: the patient is missing; add it, or drop the column")
        if len(paths) < 2:
            continue
        image, mask = paths["image"], paths["mask"]
        if image in seen:
            found.problems.append(f"{where}: image {image} is already listed in line {seen[image]}")
            continue
        seen[image] = line
        outside += PurePosixPath(image).is_absolute()
        found.pairs.append(Pair(image, root / image, mask, root / mask, row.get("patient") or None, split))
    if outside:
        found.notes.append(f"{outside} images of {MANIFEST} are outside the dataset folder (absolute paths)")
    return found


def _refused(path: str, *, absolute: bool) -> str | None:
    """Why a manifest's path is not followed; None if it is."""
    if not path:
        return "is missing"
    if PurePosixPath(path).is_absolute() or PureWindowsPath(path).drive or path.startswith("\\"):
        return None if absolute else "is absolute; masks must be inside the dataset folder"
    if normal_path(path).split("/")[0] == "..":
        return "leads out of the dataset folder; refused"
    return None


def _pair_folders(
    root: Path, folders: tuple[str, str], found: LayoutResult, *, split: str | None = None, nnunet: bool = False
) -> None:
    for folder in folders:
        if not (root / folder).is_dir():
            found.problems.append(f"{folder}/ is missing")
            return
    images, masks = (_by_key(root, folder, found) for folder in folders)
    taken: dict[str, str] = {}
    for key, image_ids in sorted(images.items()):
        if len(image_ids) > 1:
            found.problems.append(f"{', '.join(image_ids)}: several images with the same name")
            continue
        stem = re.sub(r"_\d{4}$", "", key) if nnunet else key
        if nnunet and re.search(r"_\d{4}$", key) and not key.endswith("_0000"):
            found.problems.append(f"{image_ids[0]}: a second channel; only images of one file are read")
            continue
        matches = [mask for suffix in ("", *_MASK_SUFFIXES) for mask in masks.get(stem + suffix, [])]
        if not matches:
            variants = " or ".join(f"{PurePosixPath(stem).name}{suffix}.*" for suffix in _MASK_SUFFIXES)
            found.problems.append(f"{image_ids[0]}: no mask named {folders[1]}/{stem}.*, {variants}")
        elif len(matches) > 1:
            found.problems.append(f"{image_ids[0]}: several masks: {', '.join(matches)}")
        elif matches[0] in taken:
            found.problems.append(f"{matches[0]}: a mask of several images: {taken[matches[0]]}, {image_ids[0]}")
        else:
            found.pairs.append(Pair(image_ids[0], root / image_ids[0], matches[0], root / matches[0], None, split))
        taken.update(dict.fromkeys(matches, image_ids[0]))
    for mask_ids in masks.values():
        found.problems += [f"{mask}: a mask without an image" for mask in mask_ids if mask not in taken]


def _by_key(root: Path, folder: str, found: LayoutResult) -> dict[str, list[str]]:
    """Image files below `folder`, keyed by their path in it without the extension."""
    result: dict[str, list[str]] = defaultdict(list)
    others = []
    for path in files_below(root / folder):
        relative = path.relative_to(root).as_posix()
        if path.suffix.lower() in SUFFIXES:
            result[path.relative_to(root / folder).with_suffix("").as_posix()].append(relative)
        else:
            others.append(relative)
    if others:
        found.notes.append(f"skipped, not images by their extension: {some(others)}")
    return result
