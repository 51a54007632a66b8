"""Dataset folders: the description and the manifest."""

import difflib
import json
import os
import posixpath
import re
import tomllib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from pdrunet_jax.config import DataConfig
from pdrunet_jax.data.manifest import MANIFEST, normal_path, read_manifest
from pdrunet_jax.data.masks import MaskCoding, declare
from pdrunet_jax.data.pairing import folded
from pdrunet_jax.model.sides import Pairs
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.files import is_present
from pdrunet_jax.runtime.opening import read_text

DESCRIPTION = "dataset.toml"
NNUNET = "dataset.json"
SPLITS = ("train", "val", "test")
_SPLIT_OF = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "testing": "test"}
_SPLIT_NAME = re.compile(r"([a-z]+?)(?:[-_ ]?(?:set|data|\d{4}))?")

_KEYS = ("name", "classes", "ignore", "threshold", "swap_on_flip", "spacing", "licence")


@dataclass(frozen=True)
class Description:
    """Declarations of a dataset folder; None or empty where absent."""

    name: str | None = None
    classes: Mapping[str, Any] = field(default_factory=dict)
    ignore: Any = None
    threshold: int | None = None
    spacing: tuple[float, float] | None = None
    """(row, column) spacing in mm."""
    swap_on_flip: Pairs | None = None
    """Pairs of classes that change places in a mirror image."""
    source: str = DESCRIPTION
    """Name of the file that declares the classes."""

    @property
    def declares_coding(self) -> bool:
        """Whether anything is declared about mask values."""
        return bool(self.classes) or self.ignore is not None or self.threshold is not None

    def coding(self, config: DataConfig) -> MaskCoding:
        """The mask coding, with the overrides of `config`. Raises `UserError`."""
        classes = config.classes or self.classes
        ignore = self.ignore if config.ignore is None else config.ignore
        source = "data.classes" if config.classes else f"{self.source}: classes"
        threshold = config.threshold or (None if config.classes else self.threshold)  # the file's is for its own class
        return declare(classes, ignore, threshold, source, overlap=config.multilabel)


@dataclass(frozen=True)
class Pair:
    """An image with its mask. `id` is the image's POSIX path below the root, or an absolute path."""

    id: str
    image: Path
    mask_id: str
    mask: Path
    patient: str | None = None
    split: str | None = None
    spacing: tuple[float, float] | None = None
    """(row, column) spacing in mm that the manifest states."""
    layers: tuple[Path | None, ...] = ()
    """The mask file of each class, None where it has none; empty if `mask` holds all classes."""

    @property
    def mask_files(self) -> list[tuple[int, Path]]:
        """Every mask file, with the place of its class in `layers`."""
        return [(place, path) for place, path in enumerate(self.layers or (self.mask,)) if path is not None]


@dataclass
class LayoutResult:
    """The pairs of a dataset folder, and its problems."""

    layout: str = ""
    pairs: list[Pair] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_description(root: Path) -> Description:
    """Read dataset.toml, or dataset.json next to imagesTr/. Raises `UserError` that names the file."""
    if declared_file(root, DESCRIPTION):
        return _from_toml(root / DESCRIPTION)
    if declared_file(root, NNUNET) and (root / "imagesTr").is_dir():
        return _from_nnunet(root / NNUNET)
    return Description()


def declared_file(root: Path, name: str) -> bool:
    """Whether the file `name` is in `root`. Raises `UserError` if it is no file, or if its name is misspelt."""
    if is_present(root / name):
        return True
    for other in sorted(os.listdir(root)) if root.is_dir() else ():
        if other.lower() in (name, f"{name}.txt"):  # as other systems, and editors that hide extensions, name it
            raise UserError(f"{root / other} would be ignored: rename it to {name}, or remove it")
    return False


def split_named(name: str) -> str | None:
    """The split that a folder, or a cell of a manifest, names: train for Training, train2017, train_set; else None."""
    match = _SPLIT_NAME.fullmatch(name.strip().lower())
    word = _SPLIT_OF.get(match[1], match[1]) if match else None
    return word if word in SPLITS else None


def manifest_spacing(text: str) -> tuple[float, float] | None:
    """(row, column) spacing in mm from a manifest: one number, or two with a blank between; None if empty.

    Raises `ValueError` with the reason.
    """
    if not text.strip():
        return None
    try:
        numbers = [float(word) for word in text.split()]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or not all(0 < number < 1e6 for number in numbers):
        raise ValueError(f'spacing "{text}" is not a number of mm, or two for rows and columns, such as 0.15 0.14')
    return numbers[0], numbers[-1]


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
    swaps = values.get("swap_on_flip")
    if swaps is not None:
        pairs = isinstance(swaps, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in swaps)
        if not pairs or not all(isinstance(name, str) for pair in swaps for name in pair):
            raise UserError(f'{path}: swap_on_flip must be a list of pairs of classes, such as [["left", "right"]]')
        swaps = tuple((first, second) for first, second in swaps)
    return Description(name, values.get("classes", {}), values.get("ignore"), threshold, spacing, swaps)


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
        return read_text(path, "utf-8-sig")
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


def pairs_of_manifest(root: Path) -> LayoutResult:
    """The pairs that the manifest of `root` lists, and its problems."""
    found = LayoutResult(layout=MANIFEST)
    try:
        manifest = read_manifest(root)
    except ValueError as error:
        found.problems.append(f"{MANIFEST}: {error}")
        return found
    columns = manifest.columns
    found.notes += manifest.notes
    located, seen, owners = _Located(root), dict[Path, int](), defaultdict[str, list[str]](list)
    outside = 0
    for line, row in zip(manifest.lines, manifest.rows, strict=True):
        where = f"{MANIFEST} line {line}"
        paths, files = {}, {}
        for kind in ("image", "mask"):
            reason = _refused(row[kind], absolute=kind == "image")
            path = normal_path(row[kind])
            if reason:
                found.problems.append(f"{where}: {kind} {row[kind] or 'path'} {reason}")
            elif (spelled := located.path(path)) is None:
                found.problems.append(f"{where}: {kind} {row[kind]} does not exist, or is no file")
            else:
                paths[kind], files[kind] = path, root / spelled
        split = split_named(row.get("split", ""))
        if "split" in columns and split is None:
            found.problems.append(f'{where}: split "{row["split"]}" is not train, val or test')
        if "patient" in columns and not row["patient"]:
            found.problems.append(f"{where}: the patient is missing; add it, or drop the column")
        if len(paths) < 2:
            continue
        image, mask = paths["image"], paths["mask"]
        if files["image"] in seen:
            found.problems.append(f"{where}: image {image} is already listed in line {seen[files['image']]}")
            continue
        seen[files["image"]] = line
        outside += PurePosixPath(image).is_absolute()
        owners[mask].append(image)
        spacing = None
        try:
            spacing = manifest_spacing(row.get("spacing", ""))
        except ValueError as error:
            found.problems.append(f"{where}: {error}")
        pair = Pair(image, files["image"], mask, files["mask"], row.get("patient") or None, split, spacing)
        found.pairs.append(pair)
    if not manifest.rows:
        found.problems.append(f"{MANIFEST} lists no image")
    for mask, images in owners.items():
        if len(images) > 1:
            found.notes.append(f"warning: {len(images)} images have the same mask, {mask}: {', '.join(images[:5])}")
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


class _Located:
    """Finds files below `root` whose names are spelt as in the file system, or with other capitals or accents."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._inside: dict[str, dict[str, list[str]]] = {}

    def path(self, path: str) -> str | None:
        """`path` as the file system spells it; None if there is no such file, or if several could be meant."""
        if os.path.isfile(self._root / path):  # unlike Path.is_file, accepts any text
            return path
        spelled = "/" if path.startswith("/") else ""
        for part in path.strip("/").split("/"):
            if not os.path.lexists(self._root / spelled / part):
                names = self._names(spelled).get(folded(part), [])
                if len(names) != 1:
                    return None
                part = names[0]
            spelled = posixpath.join(spelled, part)
        return spelled if os.path.isfile(self._root / spelled) else None

    def _names(self, folder: str) -> dict[str, list[str]]:
        if folder not in self._inside:
            self._inside[folder] = defaultdict(list)
            try:
                for name in os.listdir(self._root / folder):
                    self._inside[folder][folded(name)].append(name)
            except OSError:
                pass
        return self._inside[folder]
