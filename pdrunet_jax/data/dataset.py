"""A dataset folder, opened and checked: images, masks, patients, splits, and what the masks mean."""

import difflib
import hashlib
import json
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pdrunet_jax.config import DataConfig
from pdrunet_jax.data.coding import UndeclaredError, declare, resolve
from pdrunet_jax.data.layouts import Pair, find_pairs, some
from pdrunet_jax.data.masks import MaskCoding
from pdrunet_jax.data.partition import Sample, partition
from pdrunet_jax.data.scan import Scanned, foreground_share, scan
from pdrunet_jax.errors import DataError, UserError

DESCRIPTION = "dataset.toml"
_KEYS = ("name", "classes", "ignore", "threshold", "spacing", "licence")

_HOW_TO_GET_DATA = """\
MURA's radiographs are free of charge after registration: https://stanfordmlgroup.github.io/competitions/mura/
Masks for its humerus and forearm images (CC BY 4.0) are in the FleXray data release, folder
mura_forearm_humerus_annotations: https://huggingface.co/datasets/VictorButoi/flexray-data
    python -m pdrunet_jax.data import-mura MURA-v1.1 data/mura --region XR_HUMERUS --masks FOLDER
    python -m pdrunet_jax.data import-mura --help    shows how both become a dataset folder
    python -m pdrunet_jax.train --config phantom     trains on synthetic X-rays, without any data"""

_LAYOUTS = """\
A dataset folder has one of
    manifest.csv                        columns image,mask and optionally patient,split; paths relative to it
    {train,val,test}/{images,masks}/    pairs of one name
    images/ and masks/                  pairs of one name; a mask may end in _mask, _seg or _label
    imagesTr/ and labelsTr/             nnU-Net: case_0000.png with case.png"""


@dataclass(frozen=True)
class Dataset:
    """What training, evaluation and reports need to know of a dataset folder."""

    root: Path
    name: str
    class_names: tuple[str, ...]
    """Foreground classes; the class index is the position plus 1."""
    coding: MaskCoding
    """How mask pixels become class indices."""
    samples: tuple[Sample, ...]
    notes: tuple[str, ...]
    """What the log should say."""
    spacing: tuple[float, float] | None = None
    """(row, column) spacing in mm that dataset.toml declares for all images."""
    decoded: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    """Resized pixels that the pipeline keeps; no part of what the dataset is."""

    @property
    def outputs(self) -> int:
        """Outputs that a model for this dataset has: 1 for one class, n + 1 for n."""
        return 1 if len(self.class_names) == 1 else len(self.class_names) + 1

    def of(self, split: str) -> tuple[Sample, ...]:
        """The samples of "train", "val" or "test", in the order of their ids; "all" is every one."""
        return tuple(sample for sample in self.samples if split in (sample.split, "all"))

    def fingerprint(self) -> str:
        """SHA-256 of everything that a run's data depends on: files, splits, patients, coding."""
        content = [[sample.id, sample.split, sample.patient, sample.digest] for sample in self.samples]
        return hashlib.sha256(json.dumps([content, repr(self.coding)]).encode()).hexdigest()


@dataclass(frozen=True)
class Inspection:
    """A dataset with what was seen on the way."""

    dataset: Dataset
    layout: str
    scanned: tuple[Scanned, ...]
    """In the order of the dataset's samples."""


def open_dataset(config: DataConfig) -> Dataset:
    """Open and check the dataset at `config.root`, where phantoms are drawn first if asked for and nothing is there.

    Every file is read once. Raises `UserError` if there is no dataset, `DataError` with everything that is wrong.
    """
    return inspect_dataset(config).dataset


def inspect_dataset(config: DataConfig) -> Inspection:
    """As `open_dataset`, with layout, sizes, modes and pixel counts."""
    ensure_phantoms(config)
    root = Path(config.root)
    if _vacant(root) or not root.is_dir():
        state = "is empty" if root.is_dir() else "is a file" if root.exists() else "does not exist"
        raise UserError(f"--data.root {config.root}: the folder {state}.\n{_HOW_TO_GET_DATA}\n{_LAYOUTS}")
    description = _read_description(root)
    declared = _declared(config, description)
    spacing = _spacing(description, root)
    _check_regex(config)
    found = find_pairs(root)
    if not found.layout or not (found.pairs or found.problems):
        raise UserError(f"--data.root {config.root}: no images with masks here.\n{_LAYOUTS}\n{_HOW_TO_GET_DATA}")
    pairs = sorted(found.pairs, key=lambda pair: pair.id)
    scanned = scan(pairs, declared, config.threads)
    problems = found.problems + [problem for item in scanned for problem in item.problems]
    notes = list(found.notes)
    coding = declared
    try:
        counts = [(pair.mask_id, item.codes) for pair, item in zip(pairs, scanned, strict=True) if item.codes]
        coding, more = resolve(declared, counts)
        notes += more
    except UndeclaredError as error:
        problems += error.problems
    if config.soft_masks and (len(coding.classes) > 1 or coding.ignore):
        problems.append("data.soft_masks is for masks of one class without an ignore value")
    notes += _empty_masks(pairs, scanned, coding)
    samples, more, wrong = partition(config, pairs, scanned, coding)
    if problems or wrong:
        problems += wrong
        raise DataError(f"--data.root {config.root}: {len(problems)} problem{'s' * (len(problems) > 1)}", problems)
    notes += more
    name = str(description.get("name", root.resolve().name))
    dataset = Dataset(root, name, coding.names, coding, samples, tuple(notes), spacing)
    return Inspection(dataset, found.layout, tuple(scanned))


def ensure_phantoms(config: DataConfig) -> None:
    """Draw `config.phantoms` synthetic X-rays into `config.root` if that is missing or empty. Raises `UserError`."""
    root = Path(config.root)
    if config.phantoms and _vacant(root):
        from pdrunet_jax.data.phantom import write_dataset

        write_dataset(root, config.phantoms, config.split_seed, max(config.height_width))


def _vacant(root: Path) -> bool:
    """Whether there is nothing at `root`. Raises `UserError` if that cannot be seen."""
    try:
        return not root.exists() or (root.is_dir() and not any(root.iterdir()))
    except OSError as error:
        raise UserError(f"--data.root {root}: {error.strerror}") from None


def _read_description(root: Path) -> dict[str, Any]:
    path = root / DESCRIPTION
    if not path.is_file():
        return {}
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None
    for key in values:
        if key not in _KEYS:
            close = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.5)
            raise UserError(
                f"{path}: unknown key {key}; " + (f"did you mean {close[0]}?" if close else f"known: {_KEYS}")
            )
    if not isinstance(values.get("classes", {}), dict):
        raise UserError(f"{path}: classes is a table of names and values, such as {{ bone = 255 }}")
    return values


def _declared(config: DataConfig, description: dict[str, Any]) -> MaskCoding:
    threshold = description.get("threshold")
    if threshold is not None and (not isinstance(threshold, int) or not 0 < threshold < 256):
        raise UserError(f"{DESCRIPTION}: threshold = {threshold!r} is no grey value from 1 to 255")
    threshold = config.threshold or threshold
    classes = config.classes or description.get("classes", {})
    ignore = description.get("ignore") if config.ignore is None else config.ignore
    return declare(classes, ignore, threshold, "data.classes" if config.classes else f"{DESCRIPTION}: classes")


def _spacing(description: dict[str, Any], root: Path) -> tuple[float, float] | None:
    value = description.get("spacing")
    if value is None:
        return None
    values = value if isinstance(value, list) else [value, value]
    if len(values) != 2 or not all(isinstance(item, int | float) and item > 0 for item in values):
        raise UserError(f"{root / DESCRIPTION}: spacing = {value!r} is neither a number of mm nor [rows, columns]")
    return float(values[0]), float(values[1])


def _check_regex(config: DataConfig) -> None:
    try:
        re.compile(config.patient_regex or "")
    except re.error as error:
        raise UserError(f"data.patient_regex {config.patient_regex!r} is no regular expression: {error}") from None


def _empty_masks(pairs: Sequence[Pair], scanned: Sequence[Scanned], coding: MaskCoding) -> list[str]:
    empty = [
        pair.mask_id
        for pair, item in zip(pairs, scanned, strict=True)
        if item.codes and not foreground_share(item.codes, coding)
    ]
    return [f"warning: {len(empty)} empty masks: {some(empty)}"] if empty and coding.classes else []
