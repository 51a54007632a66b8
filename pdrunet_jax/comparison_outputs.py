"""A comparison of two evaluations as a table, as comparison.json and as comparison.csv."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pdrunet_jax import compare
from pdrunet_jax.compare import Comparison, Other
from pdrunet_jax.errors import RunError
from pdrunet_jax.files import atomic_write
from pdrunet_jax.rows import METRICS, Row
from pdrunet_jax.scores import aligned, label, without_nan

FILES = ("comparison.json", "comparison.csv")


def comparison_table(comparison: Comparison) -> str:
    """The comparison as text: a line for each class and metric, and the images that changed most."""
    groups = dict(comparison.classes)
    if len(groups) > 1:
        groups["mean of classes"] = comparison.macro
    head = ("class", "metric", "this", "other", "difference", "95% interval", "p", "better", "worse", "equal")
    lines: list[tuple[str, ...]] = [head]
    for name, metrics in groups.items():
        for metric, d in metrics.items():
            lines.append(
                (
                    name,
                    compared_label(metric, comparison.unit, comparison.tolerance),
                    f"{d.this:.3f}",
                    f"{d.other:.3f}",
                    f"{d.mean:+.3f}",
                    f"{d.low:+.3f} to {d.high:+.3f}",
                    f"{d.p:.2g}",
                    *(str(count) for count in (d.better, d.worse, d.equal)),
                )
            )
    counted = f"{comparison.images} images of {comparison.patients} patients"
    text = [
        f"this minus other ({comparison.against}), on the same {counted}; p of a sign-flip test of the patients' sums",
        aligned(lines, words=2),
    ]
    if comparison.changed:
        changed: list[tuple[str, ...]] = [("changed most", "dice here", "there", "difference")]
        changed += [
            (image, f"{this:.3f}", f"{other:.3f}", f"{this - other:+.3f}") for image, this, other in comparison.changed
        ]
        text.append(aligned(changed, words=1))
    else:
        text.append("Dice is equal on every image")
    return "\n".join(text)


def compared_label(metric: str, unit: str, tolerance: float) -> str:
    """As `scores.label`; area errors are compared by their size, so that less is better."""
    return "|area_error|" if metric == "area_error" else label(metric, unit, tolerance)


def write_comparison(comparison: Comparison, rows: Sequence[Row], other: Other, folder: Path) -> None:
    """Write comparison.json, and comparison.csv with both scores and their difference for each image and class.

    Raises `RunError` if `folder` cannot be written.
    """
    values: dict[str, Any] = without_nan(asdict(comparison))
    values["changed"] = [dict(zip(("image", "this", "other"), case, strict=True)) for case in comparison.changed]
    theirs = {(row.image, row.class_name): row for row in other.rows}
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    kinds = ("this", "other", "difference")
    writer.writerow(["image", "patient", "class", *(f"{metric}_{kind}" for metric in METRICS for kind in kinds)])
    for row in rows:
        cells: list[str] = [row.image, row.patient, row.class_name]
        for metric in METRICS:
            pair = row, theirs[row.image, row.class_name]
            change = compare.value(pair[0], metric) - compare.value(pair[1], metric)
            cells += [f"{value:.{compare.DIGITS}f}" for value in (*(getattr(side, metric) for side in pair), change)]
        writer.writerow(cells)
    with_json, with_csv = (folder / name for name in FILES)
    try:
        atomic_write(with_json, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
        atomic_write(with_csv, file.getvalue())
    except OSError as error:
        raise RunError(f"{error.filename or folder}: cannot be written ({error.strerror})") from None


def remove_comparison(folder: Path) -> None:
    """Remove what an earlier comparison left in `folder`: it is of other scores than are there now."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
