"""Paired comparison of two evaluations of the same images: differences with intervals and a sign-flip test.

Scores are paired by image and class, and patients stay whole in intervals and test (docs/metrics.md). A difference is
this evaluation minus the other.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pdrunet_jax.evaluate import scores
from pdrunet_jax.evaluate.intervals import interval
from pdrunet_jax.evaluate.scores import METRICS, ImageScores, ScoringOptions, format_score
from pdrunet_jax.runtime.cli import printable
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.files import atomic_write, csv_text, is_present, writing
from pdrunet_jax.runtime.opening import read_text

FILES = ("comparison.json", "comparison.csv")
LOWER_IS_BETTER = ("hd95", "assd", "area_error")
FLIPS = 1 << 16  # sign flips evaluated: all of them for up to 16 patients, random ones for more
MOST_BYTES = 1 << 30  # of a file of another evaluation
MOST_LISTED = 6  # images listed as most changed, or as missing
DIGITS = 6  # decimals that scores are rounded to before comparison, the same as in per_image.csv

Pairs = Mapping[str, tuple[float, float]]  # image to the scores of this evaluation and the other, both defined


@dataclass(frozen=True)
class Other:
    """The evaluation to compare with."""

    name: str
    rows: tuple[ImageScores, ...]
    rules: ScoringOptions | None = None
    """Scoring options, if known."""


@dataclass(frozen=True)
class Difference:
    """One metric over the images where both evaluations define it; NaN where it cannot be computed."""

    this: float
    other: float
    mean: float
    """Mean of this minus other, with the 95 % interval `low` to `high`."""
    low: float
    high: float
    p: float
    """Two-sided p-value of the sign-flip test."""
    better: int
    """Number of images on which this evaluation is better."""
    worse: int
    equal: int
    images: int
    patients: int


@dataclass(frozen=True)
class Comparison:
    """Differences `classes[name][metric]`, and `macro[metric]` over the per-image means of the classes."""

    against: str
    unit: str
    tolerance: float
    classes: dict[str, dict[str, Difference]]
    macro: dict[str, Difference]
    changed: tuple[dict[str, Any], ...]
    """"image", and its Dice (mean of classes) as "this" and "other", largest change first."""
    images: int
    patients: int

    def to_dict(self) -> dict[str, Any]:
        """Content of comparison.json, with None for NaN."""
        return scores.without_nan(asdict(self))


def read_other(folder: Path) -> Other | None:
    """Read the evaluation in `folder` (or its per_image.csv); None if there is none.

    Raises `UserError` with the file's name if it cannot be read.
    """
    path = folder if folder.suffix == ".csv" else folder / "per_image.csv"
    if not is_present(path):
        return None
    summary = path.with_name("summary.json")
    for file in (path, summary):
        if file.is_file() and file.stat().st_size > MOST_BYTES:
            raise UserError(f"{file} is larger than any file of an evaluation; pass the weights instead")
    rows = tuple(scores.read_csv(path))
    if not is_present(summary):
        return Other(str(folder), rows)
    try:
        values = json.loads(read_text(summary))
        empty = math.nan if values["empty_dice"] is None else float(values["empty_dice"])
        rules = ScoringOptions(str(values["unit"]), float(values["tolerance"]), empty)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{summary} is not the summary of an evaluation; pass the weights instead") from None
    return Other(str(folder), rows, rules)


def check_rules(ours: ScoringOptions, other: Other) -> None:
    """Raise `UserError` if `other` was scored with options other than `ours`."""
    if other.rules is None or str(other.rules) == str(ours):  # as text, because NaN differs from NaN
        return
    theirs, these = (
        f"distances in {rules.unit}, --tolerance {rules.tolerance:g}, --empty-dice {rules.empty_dice:g}"
        for rules in (other.rules, ours)
    )
    raise UserError(
        f"--against {other.name}: scored with {theirs}, but this evaluation uses {these}; use the same options, or "
        "pass the weights instead of the folder"
    )


def check_pairs(keys: Iterable[tuple[str, str]], other: Other) -> None:
    """Raise `UserError` listing (image, class) pairs that only one of the two evaluations has."""
    here, there = set(keys), {(row.image, row.class_name) for row in other.rows}
    problems = [
        f"{len(keys)} {where}: " + ", ".join(f"{image} ({name})" for image, name in sorted(keys)[:MOST_LISTED])
        for where, keys in ((f"missing from {other.name}", here - there), ("missing here", there - here))
        if keys
    ]
    if problems:
        raise UserError(
            f"--against {other.name}: the images and classes differ: {'; '.join(problems)}. Use the --data.root and "
            "--split of the other evaluation, or pass its weights instead of the folder"
        )


def compare(rows: Sequence[ImageScores], other: Other, rules: ScoringOptions, seed: int = 0) -> Comparison:
    """Compare `rows`, scored with `rules`, with `other`; `seed` is for intervals and random flips.

    Patients are taken from `rows`. Raises `UserError` if images, classes or scoring options differ.
    """
    check_rules(rules, other)
    check_pairs(((row.image, row.class_name) for row in rows), other)
    patient_of = {row.image: row.patient for row in rows}
    names = list(dict.fromkeys(row.class_name for row in rows))
    pairs = {metric: {name: _pairs(rows, other, metric, name) for name in names} for metric in METRICS}
    means = {metric: _means(list(of_class.values())) for metric, of_class in pairs.items()}
    changes = sorted(means["dice"].items(), key=lambda case: -abs(case[1][0] - case[1][1]))
    changed = ({"image": image, "this": here, "other": there} for image, (here, there) in changes if here != there)
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
        changed=tuple(islice(changed, MOST_LISTED)),
        images=len(patient_of),
        patients=len(set(patient_of.values())),
    )


def difference(metric: str, pairs: Pairs, patient_of: Mapping[str, str], seed: int = 0) -> Difference:
    """Compute the statistics of one metric over `pairs`; `patient_of` maps images to patients."""
    if not pairs:
        nan = math.nan
        return Difference(nan, nan, nan, nan, nan, nan, better=0, worse=0, equal=0, images=0, patients=0)
    this, other = np.asarray(list(pairs.values()), np.float64).T
    patients = [patient_of[image] for image in pairs]
    changes = np.round(this - other, DIGITS)
    least, most = scores.RANGES.get(metric, (0.0, 1.0))
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
    """Two-sided p-value of the sign-flip test, with whole patients as exchangeable blocks.

    Null hypothesis: swapping the two evaluations makes no difference, so a patient's sum of differences has either sign
    with equal probability. p is the share of sign flips whose total is at least as far from 0 as the observed one. With
    K patients, it is at least 2 / 2^K. Patients whose sum is 0 are excluded.
    """
    _, member = np.unique(np.asarray(patients), return_inverse=True)
    sums = np.rint(np.bincount(member, weights=differences) * 10**DIGITS)  # whole numbers, so that ties are exact
    sums = sums[sums != 0]
    if sums.size < 2:
        return 1.0
    from scipy.stats import permutation_test  # takes most of a second

    def distance(sums: np.ndarray, axis: int) -> np.ndarray:
        return np.abs(sums.sum(axis))

    flips: dict[str, Any] = {"permutation_type": "samples", "n_resamples": FLIPS, "batch": 1000, "rng": seed}
    return float(permutation_test((sums,), distance, vectorized=True, alternative="greater", **flips).pvalue)


def comparison_text(comparison: Comparison) -> str:
    """The comparison as printed: a line per class and metric, then the images that changed most."""
    values = comparison.to_dict()
    changed = scores.aligned(changed_table(values), words=1) if values["changed"] else "Dice is equal on every image"
    return printable("\n".join([caption(values), scores.aligned(comparison_table(values), words=2), changed]))


def caption(values: Mapping[str, Any]) -> str:
    """What was compared, from comparison.json."""
    return (
        f"This minus other ({values['against']}), on the same {values['images']} images of {values['patients']} "
        "patients. p: sign-flip test by patient, not corrected for the number of metrics."
    )


def comparison_table(values: Mapping[str, Any]) -> list[list[str]]:
    """Header and cells of the differences in comparison.json; two columns of words, then numbers."""
    head = ["class", "metric", "this", "other", "difference", "95% interval", "p", "better", "worse", "equal"]
    table = [head]
    for name, metric, d in scores.by_class(values):
        # The area error is compared by its absolute value.
        title = "|area_error|" if metric == "area_error" else scores.label(metric, values["unit"], values["tolerance"])
        signed = f"{format_score(d['low'], '+')} to {format_score(d['high'], '+')}"
        shown = format_score(d["this"]), format_score(d["other"]), format_score(d["mean"], "+"), signed
        p = "n/a" if d["p"] is None else f"{d['p']:.2g}"
        table.append([name, title, *shown, p, *(str(d[count]) for count in ("better", "worse", "equal"))])
    return table


def changed_table(values: Mapping[str, Any]) -> list[list[str]]:
    """Header and cells of the images in comparison.json whose Dice changed most; one column of words, then numbers."""
    table = [["changed most", "Dice, this", "Dice, other", "difference"]]
    for case in values["changed"]:
        this, other = case["this"], case["other"]
        table.append([case["image"], format_score(this), format_score(other), format_score(this - other, "+")])
    return table


def write_comparison(comparison: Comparison, rows: Sequence[ImageScores], other: Other, folder: Path) -> None:
    """Write comparison.json, and comparison.csv with both scores and their difference for each image and class.

    Raises `RunError` if `folder` cannot be written.
    """
    theirs = {(row.image, row.class_name): row for row in other.rows}
    kinds = ("this", "other", "difference")
    lines = [["image", "patient", "class", *(f"{metric}_{kind}" for metric in METRICS for kind in kinds)]]
    for row in rows:
        cells = [row.image, row.patient, row.class_name]
        pair = row, theirs[row.image, row.class_name]
        for metric in METRICS:
            change = _value(pair[0], metric) - _value(pair[1], metric)
            cells += [f"{value:.{DIGITS}f}" for value in (*(getattr(side, metric) for side in pair), change)]
        lines.append(cells)
    with_json, with_csv = (folder / name for name in FILES)
    with writing(folder):
        atomic_write(with_json, json.dumps(comparison.to_dict(), indent=2, ensure_ascii=False) + "\n")
        atomic_write(with_csv, csv_text(lines))


def _value(row: ImageScores, metric: str) -> float:
    """Score rounded to the decimals of per_image.csv; the absolute value of the area error."""
    rounded = round(getattr(row, metric), DIGITS)
    return abs(rounded) if metric == "area_error" else rounded


def _pairs(rows: Iterable[ImageScores], other: Other, metric: str, name: str) -> Pairs:
    theirs = {row.image: _value(row, metric) for row in other.rows if row.class_name == name}
    found = {row.image: (_value(row, metric), theirs[row.image]) for row in rows if row.class_name == name}
    return {image: pair for image, pair in found.items() if not any(map(math.isnan, pair))}


def _means(of_classes: Sequence[Pairs]) -> Pairs:
    """Mean scores per image over the classes for which both evaluations define them."""
    means = {}
    for image in dict.fromkeys(image for pairs in of_classes for image in pairs):
        here, there = zip(*(pairs[image] for pairs in of_classes if image in pairs), strict=True)
        means[image] = sum(here) / len(here), sum(there) / len(there)
    return means
