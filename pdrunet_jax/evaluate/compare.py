"""Two evaluations of the same images: mean differences with intervals, a paired test, and the images that changed most.

Everything is paired by image and class, and patients stay whole in intervals and test (docs/metrics.md). A difference
is this evaluation less the other.

A comparison of two evaluations as a table, as comparison.json and as comparison.csv.
"""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pdrunet_jax.evaluate.intervals import interval
from pdrunet_jax.evaluate.scores import (
    METRICS,
    RANGES,
    ImageScores,
    ScoringOptions,
    aligned,
    label,
    read_csv,
    without_nan,
)
from pdrunet_jax.runtime.errors import RunError, UserError
from pdrunet_jax.runtime.files import atomic_write

LOWER_IS_BETTER = ("hd95", "assd", "area_error")
EXACT = 16
"""Patients up to which every flip of signs is tried."""
FLIPS = 20_000
"""Random flips of signs for more patients."""
MOST_LISTED = 6
"""Images named as those that changed most, or as missing."""
DIGITS = 6
"""Decimals that scores are compared to, those of per_image.csv."""

Pairs = Mapping[str, tuple[float, float]]
"""By image a score of this evaluation and of the other, both defined."""


@dataclass(frozen=True)
class Other:
    """What an evaluation is compared with."""

    name: str
    rows: tuple[ImageScores, ...]
    rules: ScoringOptions | None = None
    """What it was scored by, where that is known."""


@dataclass(frozen=True)
class Difference:
    """One metric on the images on which both evaluations define it; NaN where there is nothing to compute it from."""

    this: float
    other: float
    mean: float
    """Of the differences, this less other; `low` and `high` bound its 95 % interval."""
    low: float
    high: float
    p: float
    """Of the sign-flip test: how often chance alone gives a difference at least as large, in either direction."""
    better: int
    """Images on which this evaluation is better."""
    worse: int
    equal: int
    images: int
    patients: int


@dataclass(frozen=True)
class Comparison:
    """`classes[name][metric]`, and `macro[metric]` over the per-image means of classes."""

    against: str
    unit: str
    tolerance: float
    classes: dict[str, dict[str, Difference]]
    macro: dict[str, Difference]
    changed: tuple[tuple[str, float, float], ...]
    """Image with its Dice (mean of classes) here and there, the largest change first."""
    images: int
    patients: int


def read_other(folder: Path) -> Other | None:
    """The evaluation in `folder`, or in the file per_image.csv that it is; None if there is none.

    Raises `UserError` that names the file if it cannot be read.
    """
    path = folder if folder.suffix == ".csv" else folder / "per_image.csv"
    if not path.is_file():
        return None
    rows = tuple(read_csv(path))
    summary = path.with_name("summary.json")
    if not summary.is_file():
        return Other(str(folder), rows)
    try:
        values = json.loads(summary.read_text(encoding="utf-8"))
        empty = math.nan if values["empty_dice"] is None else float(values["empty_dice"])
        rules = ScoringOptions(str(values["unit"]), float(values["tolerance"]), empty)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{summary} is no summary of an evaluation; give the weights in place of it") from None
    return Other(str(folder), rows, rules)


def check_rules(ours: ScoringOptions, other: Other) -> None:
    """Raise `UserError` if `other` was scored by other rules than `ours`."""
    if other.rules is None or str(other.rules) == str(ours):  # as text, in which nan is nan
        return
    theirs, these = (
        f"distances in {rules.unit}, --tolerance {rules.tolerance:g}, --empty-dice {rules.empty_dice:g}"
        for rules in (other.rules, ours)
    )
    raise UserError(
        f"--against {other.name}: it was scored with {theirs}, and this would be with {these}; give the same options, "
        "or its weights in place of the folder"
    )


def check_pairs(keys: Iterable[tuple[str, str]], other: Other) -> None:
    """Raise `UserError` that names what only one of two evaluations has; `keys` are pairs of image and class."""
    here, there = set(keys), {(row.image, row.class_name) for row in other.rows}
    problems = [
        f"{len(keys)} {where}: " + ", ".join(f"{image} ({name})" for image, name in sorted(keys)[:MOST_LISTED])
        for where, keys in ((f"missing from {other.name}", here - there), ("missing here", there - here))
        if keys
    ]
    if problems:
        raise UserError(
            f"--against {other.name}: these are not the same images and classes; {'; '.join(problems)}. Take the same "
            "--data.root and --split as for the other evaluation, or give its weights in place of the folder"
        )


def compare(rows: Sequence[ImageScores], other: Other, rules: ScoringOptions, seed: int = 0) -> Comparison:
    """Compare the scores `rows` with those of `other`; which patient an image is of, `rows` say.

    Args:
        rows: Of this evaluation, scored by `rules`.
        other: The other one.
        rules: See `ScoringOptions`.
        seed: Of the intervals and of random flips.

    Raises:
        UserError: Images, classes or rules differ.
    """
    check_rules(rules, other)
    check_pairs(((row.image, row.class_name) for row in rows), other)
    patient_of = {row.image: row.patient for row in rows}
    names = list(dict.fromkeys(row.class_name for row in rows))
    pairs = {metric: {name: _pairs(rows, other, metric, name) for name in names} for metric in METRICS}
    means = {metric: _means(list(by_class.values())) for metric, by_class in pairs.items()}
    changes = sorted(means["dice"].items(), key=lambda case: -abs(case[1][0] - case[1][1]))
    classes = {
        name: {metric: difference(metric, pairs[metric][name], patient_of, seed) for metric in METRICS}
        for name in names
    }
    one = len(names) == 1
    return Comparison(
        against=other.name,
        unit=rules.unit,
        tolerance=rules.tolerance,
        classes=classes,
        macro=classes[names[0]] if one else {name: difference(name, means[name], patient_of, seed) for name in METRICS},
        changed=tuple((image, here, there) for image, (here, there) in changes[:MOST_LISTED] if here != there),
        images=len(patient_of),
        patients=len(set(patient_of.values())),
    )


def difference(metric: str, pairs: Pairs, patient_of: Mapping[str, str], seed: int = 0) -> Difference:
    """The statistics of one metric over `pairs`; `patient_of` says whose image each is."""
    if not pairs:
        nan = math.nan
        return Difference(nan, nan, nan, nan, nan, nan, better=0, worse=0, equal=0, images=0, patients=0)
    this, other = np.asarray(list(pairs.values()), np.float64).T
    patients = [patient_of[image] for image in pairs]
    changes = np.round(this - other, DIGITS)
    least, most = RANGES.get(metric, (0.0, 1.0))
    low, high = interval(changes, patients, seed, bounds=(least - most, most - least))
    gains = -changes if metric in LOWER_IS_BETTER else changes
    return Difference(
        this=float(this.mean()),
        other=float(other.mean()),
        mean=float(changes.mean()),
        low=low,
        high=high,
        p=sign_flip(changes, patients, seed),
        better=int((gains > 0).sum()),
        worse=int((gains < 0).sum()),
        equal=int((gains == 0).sum()),
        images=len(pairs),
        patients=len(set(patients)),
    )


def sign_flip(differences: np.ndarray, patients: Sequence[str], seed: int = 0) -> float:
    """The p-value, two-sided, of the hypothesis that which of two evaluations is which makes no difference.

    Under it, the sum of a patient's differences is as likely to have the opposite sign. The p-value is the share of all
    flips of whole patients' signs whose total is at least as far from 0 as the one observed: of every flip for up to
    `EXACT` patients, and of `FLIPS` random ones and the observed one for more. At K patients it cannot be below
    2 / 2^K. Patients whose sum is 0 have no part in it.
    """
    _, member = np.unique(np.asarray(patients), return_inverse=True)
    sums = np.bincount(member, weights=differences)
    sums = sums[sums != 0]
    least = abs(sums.sum()) * (1 - 1e-9) - 1e-12  # rounding must not make a tie a miss
    if len(sums) <= EXACT:
        totals = np.zeros(1)
        for value in sums:
            totals = np.concatenate([totals + value, totals - value])
        return float(np.mean(np.abs(totals) >= least))
    generator, extreme, part = np.random.default_rng(seed), 0, 1000
    for _ in range(FLIPS // part):
        signs = generator.integers(2, size=(part, len(sums)), dtype=np.int8) * 2.0 - 1
        extreme += int(np.count_nonzero(np.abs(signs @ sums) >= least))
    return (extreme + 1) / (FLIPS + 1)


def value(row: ImageScores, metric: str) -> float:
    """A score as it is compared: to the decimals of per_image.csv; of the area error, its size."""
    rounded = round(getattr(row, metric), DIGITS)
    return abs(rounded) if metric == "area_error" else rounded


def _pairs(rows: Iterable[ImageScores], other: Other, metric: str, name: str) -> Pairs:
    theirs = {row.image: value(row, metric) for row in other.rows if row.class_name == name}
    found = {row.image: (value(row, metric), theirs[row.image]) for row in rows if row.class_name == name}
    return {image: pair for image, pair in found.items() if not any(map(math.isnan, pair))}


def _means(by_class: Sequence[Pairs]) -> Pairs:
    """For each image the means over those classes on which both evaluations define the score."""
    means = {}
    for image in dict.fromkeys(image for pairs in by_class for image in pairs):
        here, there = zip(*(pairs[image] for pairs in by_class if image in pairs), strict=True)
        means[image] = sum(here) / len(here), sum(there) / len(there)
    return means


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


def write_comparison(comparison: Comparison, rows: Sequence[ImageScores], other: Other, folder: Path) -> None:
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
            change = value(pair[0], metric) - value(pair[1], metric)
            cells += [f"{value:.{DIGITS}f}" for value in (*(getattr(side, metric) for side in pair), change)]
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
