"""Scores of one image: a row for each class, and the rows of a split as per_image.csv. docs/metrics.md defines them."""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from pdrunet_jax import metrics, surface
from pdrunet_jax.data.masks import IGNORE
from pdrunet_jax.errors import UserError

OVERLAP = ("dice", "iou", "precision", "recall", "specificity")
METRICS = (*OVERLAP, "hd95", "assd", "nsd", "area_error")
RANGES = {"hd95": (0.0, math.inf), "assd": (0.0, math.inf), "area_error": (-1.0, math.inf)}
"""Where a metric lies, if not from 0 to 1."""


@dataclass(frozen=True)
class Rules:
    """What scores depend on beside the masks."""

    unit: str = "pixels"
    """Of distances: "pixels" or "mm"."""
    tolerance: float = 2.0
    """Distance, in `unit`, within which `nsd` counts a boundary as right."""
    empty_dice: float = 1.0
    """Dice and IoU of a class that neither truth nor prediction has; NaN leaves it out of means."""


@dataclass(frozen=True)
class Row:
    """Scores of one class in one image; NaN where a score is undefined. Pixels marked as ignored are left out."""

    image: str
    patient: str
    class_name: str
    dice: float
    iou: float
    precision: float
    recall: float
    specificity: float
    hd95: float
    """In the unit of the rules, as `assd`."""
    assd: float
    nsd: float
    area_error: float
    pixels_true: int
    pixels_predicted: int


COLUMNS = tuple("class" if item.name == "class_name" else item.name for item in fields(Row))


def score(
    image: str,
    patient: str,
    predicted: np.ndarray,
    truth: np.ndarray,
    names: Sequence[str],
    rules: Rules,
    spacing: tuple[float, float] | None = None,
) -> list[Row]:
    """A row for each of the classes `names`.

    Args:
        image: Its id.
        patient: Whose image it is.
        predicted: Class indices (H, W).
        truth: Class indices (H, W), `IGNORE` where a pixel counts nowhere.
        names: Foreground classes; they have the indices 1 to their number.
        rules: See `Rules`.
        spacing: mm from one row to the next and from one column to the next, for distances in mm; None for pixels.
    """
    valid = truth != IGNORE
    counts = metrics.confusion(predicted[None], truth[None], valid[None], len(names))
    overlap = {
        name: getattr(metrics, name)(counts, **({"empty": rules.empty_dice} if name in ("dice", "iou") else {}))[0]
        for name in OVERLAP
    }
    rows = []
    for number, name in enumerate(names):
        ours, theirs = (predicted == number + 1) & valid, truth == number + 1
        apart = surface.distances(ours, theirs, spacing=spacing, tolerance=rules.tolerance)
        rows.append(
            Row(
                image,
                patient,
                name,
                **{metric: float(values[number]) for metric, values in overlap.items()},
                hd95=apart.hd95,
                assd=apart.assd,
                nsd=apart.nsd,
                area_error=surface.area_error(ours, theirs),
                pixels_true=int(np.count_nonzero(theirs)),
                pixels_predicted=int(np.count_nonzero(ours)),
            )
        )
    return rows


def to_csv(rows: Iterable[Row]) -> str:
    """The text of per_image.csv: `COLUMNS`, then a line for each row, scores to six decimals, nan where undefined."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        cells = [getattr(row, item.name) for item in fields(row)]
        writer.writerow([f"{cell:.6f}" if isinstance(cell, float) else cell for cell in cells])
    return file.getvalue()


def read_csv(path: Path) -> list[Row]:
    """The rows of a per_image.csv. Raises `UserError` that names the file, and the line if one is wrong."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise UserError(
                    f"{path} has no column {', '.join(missing)}: evaluate those weights again, or give the weights"
                )
            rows = []
            for line in reader:
                try:
                    rows.append(_row(line))
                except (TypeError, ValueError):
                    raise UserError(f"{path}: line {reader.line_num} is no row of scores") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    return rows


def _row(line: dict[str, str]) -> Row:
    return Row(
        line["image"],
        line["patient"],
        line["class"],
        **{metric: float(line[metric]) for metric in METRICS},
        pixels_true=int(line["pixels_true"]),
        pixels_predicted=int(line["pixels_predicted"]),
    )
