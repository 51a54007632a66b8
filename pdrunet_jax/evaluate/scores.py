"""Scores per image and class, their statistics with confidence intervals, and both as text (docs/metrics.md)."""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from pdrunet_jax.data.layers import counted, region
from pdrunet_jax.data.masks import IGNORE
from pdrunet_jax.evaluate import metrics, surface
from pdrunet_jax.evaluate.intervals import interval
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.files import csv_name, csv_text

OVERLAP = ("dice", "iou", "precision", "recall", "specificity")
METRICS = (*OVERLAP, "hd95", "assd", "nsd", "area_error")
RANGES = {"hd95": (0.0, math.inf), "assd": (0.0, math.inf), "area_error": (-1.0, math.inf)}  # if not [0, 1]


@dataclass(frozen=True)
class ScoringOptions:
    """Options that scores depend on, apart from the masks."""

    unit: str = "pixels"
    """Unit of distances: "pixels" or "mm"."""
    tolerance: float = 2.0
    """Largest distance, in `unit`, at which `nsd` counts a boundary pixel as correct."""
    empty_dice: float = 1.0
    """Dice and IoU of a class absent from both truth and prediction; NaN excludes it from means."""


@dataclass(frozen=True)
class ImageScores:
    """Scores of one class in one image, ignored pixels excluded; NaN where a score is undefined."""

    image: str
    patient: str
    class_name: str
    dice: float
    iou: float
    precision: float
    recall: float
    specificity: float
    hd95: float
    """In `ScoringOptions.unit`, like `assd`."""
    assd: float
    nsd: float
    area_error: float
    pixels_true: int
    pixels_predicted: int


CSV_COLUMNS = tuple("class" if item.name == "class_name" else item.name for item in fields(ImageScores))


@dataclass(frozen=True)
class Statistic:
    """One metric over the images that define it; NaN where it cannot be computed.

    `std` is the sample standard deviation; `low` and `high` are the 95 % interval of the mean.
    """

    mean: float
    median: float
    std: float
    low: float
    high: float
    images: int
    patients: int


@dataclass(frozen=True)
class Summary:
    """Statistics of every metric: `classes[name][metric]`, and `macro[metric]` over per-image means of the classes.

    For each class, `empty` counts the images whose truth and prediction are both empty, and `one_empty` those where
    exactly one is. `images` and `patients` are totals.
    """

    unit: str
    tolerance: float
    empty_dice: float
    classes: dict[str, dict[str, Statistic]]
    macro: dict[str, Statistic]
    empty: dict[str, int]
    one_empty: dict[str, int]
    images: int
    patients: int

    @property
    def rules(self) -> ScoringOptions:
        """The options that the scores were computed with."""
        return ScoringOptions(self.unit, self.tolerance, self.empty_dice)

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries for JSON, with None for NaN."""
        return without_nan(asdict(self))


def score(
    image: str,
    patient: str,
    predicted: np.ndarray,
    truth: np.ndarray,
    names: Sequence[str],
    rules: ScoringOptions,
    spacing: tuple[float, float] | None = None,
) -> list[ImageScores]:
    """Score one image: one row per foreground class, where `names[i]` has the index i + 1.

    `predicted` and `truth` are class indices (H, W), or layers (H, W, K) if classes overlap; true pixels of `IGNORE`
    are excluded. `spacing` is the distance between rows and between columns in mm; None measures in pixels.
    """
    valid = truth != IGNORE
    counts = metrics.confusion(predicted[None], truth[None], valid[None], len(names))
    overlap = {
        name: getattr(metrics, name)(counts, **({"empty": rules.empty_dice} if name in ("dice", "iou") else {}))[0]
        for name in OVERLAP
    }
    rows = []
    for number, name in enumerate(names):
        ours, theirs = region(predicted, number + 1) & counted(truth, number + 1), region(truth, number + 1)
        apart = surface.distances(ours, theirs, spacing=spacing, tolerance=rules.tolerance)
        rows.append(
            ImageScores(
                image,
                patient,
                name,
                **{metric: float(values[number]) for metric, values in overlap.items()},
                **vars(apart),
                area_error=surface.area_error(ours, theirs),
                pixels_true=int(np.count_nonzero(theirs)),
                pixels_predicted=int(np.count_nonzero(ours)),
            )
        )
    return rows


def to_csv(rows: Iterable[ImageScores]) -> str:
    """Text of per_image.csv: `CSV_COLUMNS`, then one line per row; six decimals, nan where undefined."""
    cells = ([f"{cell:.6f}" if isinstance(cell, float) else cell for cell in vars(row).values()] for row in rows)
    return csv_text([CSV_COLUMNS, *cells])


def read_csv(path: Path) -> list[ImageScores]:
    """Read the rows of a per_image.csv. Raises `UserError` with the file and line that are wrong."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if missing := [name for name in CSV_COLUMNS if name not in (reader.fieldnames or ())]:
                raise UserError(
                    f"{path} lacks the column {', '.join(missing)}: evaluate those weights again, or pass the weights"
                )
            return [
                ImageScores(
                    csv_name(line["image"]),
                    csv_name(line["patient"]),
                    csv_name(line["class"]),
                    **{metric: float(line[metric]) for metric in METRICS},
                    pixels_true=int(line["pixels_true"]),
                    pixels_predicted=int(line["pixels_predicted"]),
                )
                for line in reader
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    except (TypeError, ValueError):
        raise UserError(f"{path}: line {reader.line_num} is not a row of scores") from None


def summarise(rows: Sequence[ImageScores], rules: ScoringOptions, seed: int = 0) -> Summary:
    """Compute the statistics of `rows`, scored with `rules`; `seed` is for the bootstrap.

    Macro scores are averaged over the classes of an image that define them, then over images.
    """
    names = list(dict.fromkeys(row.class_name for row in rows))
    per_class = {name: [row for row in rows if row.class_name == name] for name in names}
    patient_of = {row.image: row.patient for row in rows}

    def statistics(rows: Sequence[ImageScores], metric: str) -> Statistic:
        means = {image: mean for image, mean in image_means(rows, metric).items() if not math.isnan(mean)}
        patients = [patient_of[image] for image in means]
        return statistic(list(means.values()), patients, seed, RANGES.get(metric, (0.0, 1.0)))

    def count_empty(masks: int) -> dict[str, int]:
        return {
            name: sum((row.pixels_true == 0) + (row.pixels_predicted == 0) == masks for row in rows)
            for name, rows in per_class.items()
        }

    classes = {name: {metric: statistics(rows, metric) for metric in METRICS} for name, rows in per_class.items()}
    return Summary(
        **asdict(rules),
        classes=classes,
        macro=classes[names[0]] if len(names) == 1 else {metric: statistics(rows, metric) for metric in METRICS},
        empty=count_empty(2),
        one_empty=count_empty(1),
        images=len(patient_of),
        patients=len(set(patient_of.values())),
    )


def image_means(rows: Iterable[ImageScores], metric: str = "dice") -> dict[str, float]:
    """Mean of `metric` per image over the classes that define it; NaN if none does."""
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row.image, []).append(getattr(row, metric))
    means = {}
    for image, scores in values.items():
        defined = [score for score in scores if not math.isnan(score)]
        means[image] = sum(defined) / len(defined) if defined else math.nan
    return means


def statistic(
    values: Sequence[float], patients: Sequence[str], seed: int = 0, bounds: tuple[float, float] = (-math.inf, math.inf)
) -> Statistic:
    """Compute the `Statistic` of one value per image. `bounds` is the range of the metric."""
    scores = np.asarray(values, np.float64)
    if not scores.size:
        return Statistic(math.nan, math.nan, math.nan, math.nan, math.nan, images=0, patients=0)
    low, high = interval(scores, patients, seed, bounds=bounds)
    std = float(scores.std(ddof=1)) if scores.size > 1 else math.nan
    return Statistic(
        float(scores.mean()), float(np.median(scores)), std, low, high, images=scores.size, patients=len(set(patients))
    )


def dice_line(split: str, summary: Summary) -> str:
    """The result line, for example `test dice 0.934 (95% 0.921-0.945, 24 images, 24 patients)`.

    Stable: scripts may parse it. The bounds are nan if there is no interval (one patient).
    """
    dice = summary.macro["dice"]
    return (
        f"{split} dice {dice.mean:.3f} (95% {dice.low:.3f}-{dice.high:.3f}, "
        f"{summary.images} images, {summary.patients} patients)"
    )


def score_table(summary: Mapping[str, Any]) -> list[list[str]]:
    """Header and cells of the statistics in summary.json: one row per class and metric, then macro rows if several.

    The first two columns are words, the others numbers.
    """
    table = [["class", "metric", "mean", "95% interval", "median", "std", "images"]]
    for name, metric, s in by_class(summary):
        interval = f"{format_score(s['low'])} to {format_score(s['high'])}"
        numbers = format_score(s["mean"]), interval, format_score(s["median"]), format_score(s["std"])
        table.append([name, label(metric, summary["unit"], summary["tolerance"]), *numbers, str(s["images"])])
    return table


def by_class(values: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Class, metric and entry of every `values["classes"][name][metric]`, then of "macro" if there are several."""
    groups = dict(values["classes"])
    if len(groups) > 1:
        groups["mean of classes"] = values["macro"]
    return [(name, metric, entry) for name, metrics in groups.items() for metric, entry in metrics.items()]


def label(metric: str, unit: str, tolerance: float) -> str:
    """A metric with its unit, for example `hd95 (mm)` or `nsd (within 2 pixels)`."""
    if metric in ("hd95", "assd"):
        return f"{metric} ({unit})"
    return f"nsd (within {tolerance:g} {unit})" if metric == "nsd" else metric


def remarks(summary: Mapping[str, Any]) -> list[str]:
    """Explain how empty masks were scored, one line per class that has any; `summary` as in summary.json."""
    dice = summary["empty_dice"]
    both = "excluded from Dice, IoU and distances" if dice is None else f"Dice {dice:g}, excluded from distances"
    outcomes = {
        "empty": f"truth and prediction are both empty: {both}",
        "one_empty": "only one of truth and prediction is empty: Dice and nsd 0, excluded from other distances",
    }
    return [
        f"{name}: in {count} of {summary['images']} images {outcome}"
        for kind, outcome in outcomes.items()
        for name, count in summary[kind].items()
        if count
    ]


def format_score(value: float | None, sign: str = "") -> str:
    """Three decimals, or n/a for None and NaN; `sign` "+" shows the sign of positive values."""
    return "n/a" if value is None or math.isnan(value) else f"{value:{sign}.3f}"


def aligned(table: Sequence[Sequence[str]], words: int) -> str:
    """Align a table as text: the first `words` columns left, the others right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    sides = ["<" if column < words else ">" for column in range(len(widths))]
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True))
        for line in table
    )


def without_nan(value: Any) -> Any:
    """Replace NaN by None in nested dictionaries and lists, because JSON has no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
