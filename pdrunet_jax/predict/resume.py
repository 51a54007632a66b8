"""Which images are done already, in the way that is asked for now, and which earlier results are in the way."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pdrunet_jax.predict.inference import Prediction
from pdrunet_jax.predict.inputs import LABELME, MASK, beside
from pdrunet_jax.predict.outputs import Outputs, Record, differences, read_record, stamp, unchanged
from pdrunet_jax.runtime.errors import UserError

MOST_LISTED = 10
"""So many reasons are given where results are in the way."""


@dataclass(frozen=True)
class Recipe:
    """All that results depend on beside the image."""

    settings: Mapping[str, Any]
    """JSON values, of which the weights' digest is one."""
    classes: tuple[str, ...]
    """Names of the foreground classes."""
    outputs: int
    """Of the network."""
    written: Outputs

    def files(self, path: Path) -> list[str]:
        """Ends of the names of all that is written of the image at `path`, beside its mask."""
        return self.written.files(path, self.classes, self.outputs)

    def record(self, result: Prediction, path: Path, target: Path) -> Record:
        """The record of a new result. Files of an earlier one that does not fit it any more are removed."""
        files, image = self.files(path), stamp(path)
        earlier = _record_at(target)
        if earlier is not None:
            others = [end for end in earlier["files"] if end not in files]
            if earlier["settings"] == self.settings and earlier["input"]["sha256"] == image["sha256"]:
                files += others
            else:
                for end in others:
                    beside(target, end).unlink(missing_ok=True)
        pixels = {label: int(np.sum(result.mask == index)) for index, label in enumerate(self.classes, 1)}
        spacing = None if result.spacing is None else list(result.spacing)
        return {"settings": self.settings, "input": image, "files": files, "pixels": pixels, "spacing": spacing}


def finished(recipe: Recipe, targets: Mapping[Path, Path], *, overwrite: bool) -> dict[Path, Record]:
    """Those images whose results are all there, with their records.

    Raises `UserError` if results of the others are in the way, unless they are to be overwritten.

    Args:
        recipe: how results are made now.
        targets: for each image where its results go, without the ends of their names.
        overwrite: whether results in the way are replaced.
    """
    done: dict[Path, Record] = {}
    reasons: Counter[str] = Counter()
    examples: dict[str, Path] = {}
    for path, target in targets.items():
        record, problems = _look(recipe, path, target)
        reasons.update(problems.keys())
        examples = {**problems, **examples}
        if record is not None and not problems:
            done[path] = record
    if reasons and not overwrite:
        lines = [
            f"  - {examples[reason]}{f' and {count - 1} more' if count > 1 else ''}: {reason}"
            for reason, count in reasons.most_common(MOST_LISTED)
        ]
        raise UserError(
            "results that were made otherwise are in the way:\n"
            + "\n".join(lines)
            + "\nGive the earlier weights and options to go on, another --output, or --overwrite to replace them."
        )
    return done


def _look(recipe: Recipe, path: Path, target: Path) -> tuple[Record | None, dict[str, Path]]:
    """The record of an image whose results are all there, and what is in the way, with the file that is."""
    mask, labelled = beside(target, MASK), beside(target, LABELME)
    record = _record_at(target)
    try:
        wanted = recipe.files(path)
        changed = record is not None and not unchanged(path, record["input"])
    except OSError:  # an image that cannot be opened, which is said in its turn
        return None, {}
    problems = {}
    if record is None:
        problems = {"not written by this command, or changed since": mask} if mask.exists() else {}
    else:
        problems = dict.fromkeys(differences(record["settings"], recipe.settings), mask)
        if changed:
            problems["the image has changed"] = mask
    known = [] if record is None else record["files"]
    if LABELME in wanted and LABELME not in known and labelled.exists():
        problems["a LabelMe file is there that is not this command's"] = labelled
    complete = all(end in known and beside(target, end).exists() for end in wanted)
    return (record if complete else None), problems


def _record_at(target: Path) -> Record | None:
    """The record in the mask of a result, if there is one."""
    try:
        return read_record(beside(target, MASK))
    except OSError:
        return None
