"""What a dataset folder says of itself: dataset.toml, or nnU-Net's dataset.json."""

import difflib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pdrunet_jax.config import DataConfig
from pdrunet_jax.data.coding import declare
from pdrunet_jax.data.masks import MaskCoding
from pdrunet_jax.errors import UserError

DESCRIPTION = "dataset.toml"
NNUNET = "dataset.json"

_KEYS = ("name", "classes", "ignore", "threshold", "spacing", "licence")


@dataclass(frozen=True)
class Description:
    """The declarations of a dataset folder; what is left out is None or empty."""

    name: str | None = None
    classes: Mapping[str, Any] = field(default_factory=dict)
    ignore: Any = None
    threshold: int | None = None
    spacing: tuple[float, float] | None = None
    """(row, column) in mm."""
    source: str = DESCRIPTION
    """The file that declares the classes."""

    def coding(self, config: DataConfig) -> MaskCoding:
        """The mask coding with what `config` overrides. Raises `UserError`."""
        classes = config.classes or self.classes
        ignore = self.ignore if config.ignore is None else config.ignore
        source = "data.classes" if config.classes else f"{self.source}: classes"
        return declare(classes, ignore, config.threshold or self.threshold, source)


def read_description(root: Path) -> Description:
    """What `root` declares: dataset.toml, or dataset.json beside imagesTr/. Raises `UserError` that names the file."""
    path = root / DESCRIPTION
    if path.is_file():
        return _from_toml(path)
    if (root / NNUNET).is_file() and (root / "imagesTr").is_dir():
        return _from_nnunet(root / NNUNET)
    return Description()


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
        raise UserError(f"{path}: classes is a table of names and values, such as {{ bone = 255 }}")
    threshold = values.get("threshold")
    if threshold is not None and (type(threshold) is not int or not 0 < threshold < 256):
        raise UserError(f"{path}: threshold = {threshold!r} is no grey value from 1 to 255")
    name = values.get("name")
    return Description(
        None if name is None else str(name),
        values.get("classes", {}),
        values.get("ignore"),
        threshold,
        _spacing(values.get("spacing"), path),
    )


def _from_nnunet(path: Path) -> Description:
    """`labels` of either version: names to values, or values to names; the label "ignore" is what it says."""
    try:
        values = json.loads(_text(path))
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    labels = values.get("labels", {}) if isinstance(values, dict) else None
    if not isinstance(labels, dict):
        raise UserError(f"{path}: labels is no object of names and values")
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
        raise UserError(f"{path}: spacing = {value!r} is neither a number of mm nor [rows, columns]")
    return float(values[0]), float(values[1])
