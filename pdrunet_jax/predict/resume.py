"""Resume a prediction run: what is left to do for each image, and the files that may not be replaced.

The mask of an image is written first. Its record holds the digest of every other file, so the next run knows which
files are its own, whenever the process ended, and writes only those that are missing.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from PIL import Image
from pydantic import Field, TypeAdapter, ValidationError

from pdrunet_jax.data.layers import region, to_bits
from pdrunet_jax.model.confidence import confidences
from pdrunet_jax.predict.engines.engine import DEFAULT_ENGINE, DEFAULT_PRECISION
from pdrunet_jax.predict.inference import Prediction
from pdrunet_jax.predict.outputs import (
    CONFIDENCE,
    MASK,
    OVERLAY,
    RECORD_KEY,
    Record,
    WrittenFiles,
    mask_png,
    render,
    require_short_names,
    with_suffix,
)
from pdrunet_jax.runtime.digest import sha256
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.files import atomic_write, writing
from pdrunet_jax.runtime.opening import open_regular

ASSUMED = {"engine": DEFAULT_ENGINE, "precision": DEFAULT_PRECISION}
"""Settings of results whose records do not state them: those of earlier versions."""

MAX_LISTED = 10  # conflicts in an error message


@dataclass(frozen=True)
class _Record:
    """The form of a `Record`."""

    settings: dict[str, Any]
    input: dict[Literal["sha256"], str]
    files: dict[str, str | None]
    pixels: dict[str, Annotated[int, Field(ge=0, lt=1 << 63)]]
    mask: str | None = None
    spacing: tuple[float, float] | None = None
    confidence: dict[str, Annotated[float, Field(ge=0, le=1)]] | None = None

    def __post_init__(self) -> None:
        if "sha256" not in self.input or any("/" in suffix for suffix in self.files):
            raise ValueError("not a record of this command")


class Work(NamedTuple):
    """What is left to do for one image."""

    record: Record | None
    """Of the existing mask, if this command wrote it."""
    fits: bool
    """Whether the record has the settings and the image of this run."""
    missing: list[str]
    """Suffixes of the files to write."""
    conflicts: list[tuple[str, str]]
    """Suffix of each file that may not be replaced without --overwrite, and the reason."""

    @property
    def done(self) -> bool:
        """Whether all results of this run exist."""
        return self.fits and not self.missing


@dataclass(frozen=True)
class Recipe:
    """Everything that results depend on, except the image.

    `settings` are JSON values, including the digest of the weights. `labels` are the foreground classes, `outputs` is
    the number of the network's output channels.
    """

    settings: Mapping[str, Any]
    labels: tuple[str, ...]
    outputs: int
    files: WrittenFiles
    overlap: bool = False
    """Whether classes overlap."""
    confidence: bool = False
    """Whether the confidence in each class is recorded. A result without it is completed; its mask does not change."""

    def inspect(self, path: Path, target: Path) -> Work:
        """Compare the image at `path` and the files at `target` with the record. Raises `OSError` for the image."""
        record = read_record(target)
        wanted = [MASK, *self.files.suffixes(path, self.labels, self.outputs, overlap=self.overlap)]
        known = {} if record is None else {MASK: None, **record["files"]}
        present = [suffix for suffix in wanted if os.path.lexists(with_suffix(target, suffix))]
        conflicts = []
        if record is not None:
            then = {**ASSUMED, **record["settings"]}
            for name, now in self.settings.items():
                if then.get(name) != now:
                    changed = "other weights" if name == "weights" else f"{name} was {then.get(name)}, is {now}"
                    conflicts.append((MASK, changed))
            if record["input"]["sha256"] != sha256(path):
                conflicts.append((MASK, "the image has changed"))
        fits = record is not None and not conflicts
        foreign = [suffix for suffix in present if suffix not in known]
        missing = [suffix for suffix in wanted if suffix not in present or suffix in foreign] if fits else wanted
        conflicts += [(suffix, "not written by this command, or modified since") for suffix in foreign]

        # New digests and confidences go into the mask's record, so the mask itself is written again.
        incomplete = record is not None and fits and self.confidence and not record[CONFIDENCE]
        if record is not None and fits and (missing or incomplete):
            if (
                incomplete
                and OVERLAY in present
                and sha256(with_suffix(target, OVERLAY)) == record["files"].get(OVERLAY)
            ):
                missing = [OVERLAY, *missing]
            if _mask_digest(target) != record["mask"]:
                conflicts.append((MASK, "modified since, or written by an earlier version"))
            missing = [MASK, *(suffix for suffix in missing if suffix != MASK)]
        return Work(record, fits, missing, conflicts)

    def compose(
        self, result: Prediction, path: Path, target: Path, *, overwrite: bool, pixels: np.ndarray | None = None
    ) -> "Composed":
        """The contents of the missing files of the image at `path`: `target`_mask.png and so on. Writes nothing.

        `pixels` are its grey values (H, W, 1), if they are known. Raises `UserError` for a file that appeared during
        the run and may not be replaced, `RunError` if the folder cannot be read.
        """
        with writing(target):
            work = self.inspect(path, target)
            _require_free({target: work}, overwrite=overwrite)
            require_short_names(target, work.missing)
            suffixes = [suffix for suffix in work.missing if suffix != MASK]
            earlier: dict[str, str | None] = {} if work.record is None else work.record["files"]
            known = work.record is not None and work.fits and work.record[CONFIDENCE]
            confidence = None
            if self.confidence or known:
                values = confidences(result.probability, result.mask)
                confidence = dict(zip(self.labels, values, strict=True))
            contents = render(result, path, target, self.labels, self.files, suffixes, confidence, pixels)
            digests = {suffix: hashlib.sha256(data).hexdigest() for suffix, data in contents.items()}
            record: Record = {
                "settings": self.settings,
                "input": {"sha256": sha256(path)},
                "files": {**(earlier if work.fits else {}), **digests},
                "mask": _pixel_digest(to_bits(result.mask)),
                "pixels": {label: int(region(result.mask, i).sum()) for i, label in enumerate(self.labels, 1)},
                "spacing": None if result.spacing is None else list(result.spacing),
            }
            if confidence is not None:  # otherwise the record is what it was before there were confidences
                record[CONFIDENCE] = confidence
        return Composed(target, mask_png(result.mask, len(self.labels), record), contents, record, earlier)


class Composed(NamedTuple):
    """The files of one image, ready to be written."""

    target: Path
    mask: bytes
    contents: dict[str, bytes]
    """Of the other files, by suffix."""
    record: Record
    earlier: dict[str, str | None]
    """Files of an earlier result, with their digests."""

    def write(self) -> None:
        """Write the files, the mask first.

        Files of an earlier result that no longer match are deleted, unless they were modified. Raises `RunError` if
        the folder cannot be written.
        """
        with writing(self.target):
            self.target.parent.mkdir(parents=True, exist_ok=True)
            # Deleted first: next to the new record, an old file would pass for one that a person has modified.
            for suffix in self.contents:
                with_suffix(self.target, suffix).unlink(missing_ok=True)
            for suffix in self.earlier.keys() - self.record["files"].keys():
                file = with_suffix(self.target, suffix)
                if file.is_file() and sha256(file) == self.earlier[suffix]:
                    file.unlink()
            atomic_write(with_suffix(self.target, MASK), self.mask)
            for suffix, data in self.contents.items():
                atomic_write(with_suffix(self.target, suffix), data)


def survey(recipe: Recipe, targets: Mapping[Path, Path], *, overwrite: bool) -> dict[Path, Work]:
    """What is left to do for each image.

    `targets` maps each image to the path of its results, without suffix. Raises `UserError` if existing files conflict
    with the `recipe`, unless `overwrite` is set.
    """
    works = {}
    for path, target in targets.items():
        try:
            works[path] = recipe.inspect(path, target)
        except OSError:  # the image cannot be opened; reported when its turn comes
            works[path] = Work(None, False, [MASK], [])
    _require_free({targets[path]: work for path, work in works.items()}, overwrite=overwrite)
    return works


def read_record(target: Path) -> Record | None:
    """The record in the mask of a result; None if there is no mask, or if this command did not write it."""
    try:
        with open_regular(with_suffix(target, MASK)) as file, Image.open(file, formats=("PNG",)) as image:
            record = json.loads(image.info.get(RECORD_KEY, "null"))
    except (OSError, ValueError, SyntaxError):
        return None
    if isinstance(record, dict) and isinstance(record.get("files"), list):  # version 0.1.0 recorded no digests
        record["files"] = dict.fromkeys(map(str, record["files"]))
    try:
        return vars(TypeAdapter(_Record).validate_python(record))
    except ValidationError:
        return None


def _require_free(works: Mapping[Path, Work], *, overwrite: bool) -> None:
    """Raise `UserError` that lists the conflicts, unless `overwrite` is set."""
    found = [(conflict, target) for target, work in works.items() for conflict in work.conflicts]
    if not found or overwrite:
        return
    counts, examples = Counter(conflict for conflict, _ in found), dict(reversed(found))
    lines = [
        f"  - {with_suffix(examples[suffix, reason], suffix)}{f' and {count - 1} more' if count > 1 else ''}: {reason}"
        for (suffix, reason), count in counts.most_common(MAX_LISTED)
    ]
    raise UserError(
        "the output folder contains results made with other settings, or files that are not this command's:\n"
        + "\n".join(lines)
        + "\nTo continue, use the earlier weights and options, another --output, or --overwrite to replace them."
    )


def _mask_digest(target: Path) -> str | None:
    try:
        with open_regular(with_suffix(target, MASK)) as file, Image.open(file, formats=("PNG",)) as image:
            return _pixel_digest(np.asarray(image))
    except (OSError, ValueError, SyntaxError):
        return None


def _pixel_digest(mask: np.ndarray) -> str:
    return hashlib.sha256(f"{mask.shape} ".encode() + mask.tobytes()).hexdigest()
