"""Resume a prediction run: find finished images, and refuse to mix results made with different settings."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pdrunet_jax.predict.inference import Prediction
from pdrunet_jax.predict.outputs import LABELME, MASK, RECORD_KEY, Record, WrittenFiles, with_suffix
from pdrunet_jax.runtime.digest import sha256
from pdrunet_jax.runtime.errors import UserError

MAX_LISTED = 10  # conflicts in an error message


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

    def record(self, result: Prediction, path: Path, target: Path) -> Record:
        """The record of a new result; deletes files of an earlier result that no longer match it."""
        files, image = self.files.suffixes(path, self.labels, self.outputs), fingerprint(path)
        earlier = read_record(target)
        if earlier is not None:
            others = [suffix for suffix in earlier["files"] if suffix not in files]
            if earlier["settings"] == self.settings and earlier["input"]["sha256"] == image["sha256"]:
                files += others
            else:
                for suffix in others:
                    with_suffix(target, suffix).unlink(missing_ok=True)
        pixels = {label: int(np.sum(result.mask == index)) for index, label in enumerate(self.labels, 1)}
        spacing = None if result.spacing is None else list(result.spacing)
        return {"settings": self.settings, "input": image, "files": files, "pixels": pixels, "spacing": spacing}


def finished_images(recipe: Recipe, targets: Mapping[Path, Path], *, overwrite: bool) -> dict[Path, Record]:
    """The images whose results are complete, with their records.

    `targets` maps each image to the path of its results, without suffix. Raises `UserError` if existing results
    conflict with the `recipe`, unless `overwrite` is set.
    """
    finished: dict[Path, Record] = {}
    reasons: Counter[str] = Counter()
    examples: dict[str, Path] = {}
    for path, target in targets.items():
        record, conflicts = _inspect(recipe, path, target)
        reasons.update(conflicts.keys())
        examples = {**conflicts, **examples}
        if record is not None and not conflicts:
            finished[path] = record
    if reasons and not overwrite:
        lines = [
            f"  - {examples[reason]}{f' and {count - 1} more' if count > 1 else ''}: {reason}"
            for reason, count in reasons.most_common(MAX_LISTED)
        ]
        raise UserError(
            "the output folder contains results made with other settings:\n"
            + "\n".join(lines)
            + "\nTo continue, use the earlier weights and options, another --output, or --overwrite to replace them."
        )
    return finished


def fingerprint(path: Path) -> dict[str, Any]:
    """Identity of an image: its digest, and its size and modification time, which are quick to compare."""
    state = path.stat()
    return {"bytes": state.st_size, "changed": state.st_mtime_ns, "sha256": sha256(path)}


def unchanged(path: Path, known: Mapping[str, Any]) -> bool:
    """Whether the image at `path` still has the fingerprint `known`."""
    state = path.stat()
    same_time = state.st_mtime_ns == known["changed"]
    return state.st_size == known["bytes"] and (same_time or sha256(path) == known["sha256"])


def read_record(target: Path) -> Record | None:
    """The record in the mask of a result; None if there is no mask, or if this command did not write it."""
    try:
        with Image.open(with_suffix(target, MASK), formats=("PNG",)) as image:  # reads no pixels
            record = json.loads(image.info.get(RECORD_KEY, "null"))
    except (OSError, ValueError, SyntaxError):
        return None
    return record if isinstance(record, dict) and {"settings", "input", "files", "pixels"} <= record.keys() else None


def _inspect(recipe: Recipe, path: Path, target: Path) -> tuple[Record | None, dict[str, Path]]:
    """The record of an image whose results are complete, and conflicts, each with the file concerned."""
    mask, labelme = with_suffix(target, MASK), with_suffix(target, LABELME)
    record = read_record(target)
    try:
        wanted = recipe.files.suffixes(path, recipe.labels, recipe.outputs)
        changed = record is not None and not unchanged(path, record["input"])
    except OSError:  # the image cannot be opened; reported when its turn comes
        return None, {}
    if record is None:
        conflicts = {"not written by this command, or modified since": mask} if mask.exists() else {}
    else:
        then = record["settings"]
        differences = [name for name in recipe.settings if then.get(name) != recipe.settings[name]]
        conflicts = {
            "other weights" if name == "weights" else f"{name} was {then.get(name)}, is {recipe.settings[name]}": mask
            for name in differences
        }
        if changed:
            conflicts["the image has changed"] = mask
    known = [] if record is None else record["files"]
    if LABELME in wanted and LABELME not in known and labelme.exists():
        conflicts["a LabelMe file that this command did not write"] = labelme
    complete = all(suffix in known and with_suffix(target, suffix).exists() for suffix in wanted)
    return (record if complete else None), conflicts
