"""`python -m benchmarks.coverage`: coverage of the 95 % interval of a mean score.

Datasets are simulated from populations with a known mean: patients with 1 to 6 images each, whose scores share a
patient effect. `pdrunet_jax.evaluate.intervals.interval` is compared with the percentile interval of the same bootstrap
over patients, the usual choice.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from scipy import special

from benchmarks import machine, output
from pdrunet_jax.evaluate.intervals import RESAMPLES, interval

PATIENTS = (2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50, 100)
LARGE = 400_000
"""Simulated patients for the true mean of a population."""

Draw = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]
"""Generator and number of patients to the scores of all images, and the patient of each image."""


@dataclass(frozen=True)
class Options:
    """Measure the coverage of the confidence intervals."""

    datasets: int = 1000
    """Simulated datasets per population and number of patients."""
    patients: tuple[int, ...] = PATIENTS
    """Numbers of patients."""
    output: Path | None = None
    """JSON file for the results, e.g. benchmarks/results/coverage.json."""


def members(generator: np.random.Generator, count: int) -> np.ndarray:
    return np.repeat(np.arange(count), generator.integers(1, 7, count))


def normal(generator: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean 0.8, standard deviation 0.05 between patients and 0.05 within."""
    member = members(generator, count)
    return 0.8 + 0.05 * generator.normal(size=count)[member] + 0.05 * generator.normal(size=len(member)), member


def skewed(generator: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores of a good model: logit 2.6, standard deviation 0.8 between patients and 0.6 within; mean 0.90."""
    member = members(generator, count)
    effect = generator.normal(size=count)
    return special.expit(2.6 + 0.8 * effect[member] + 0.6 * generator.normal(size=len(member))), member


def linked(generator: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Like `skewed`, but each additional image lowers the patient's logit by 0.2: the sicker have more X-rays taken."""
    member = members(generator, count)
    images = np.bincount(member)
    effect = 0.8 * generator.normal(size=count) - 0.2 * (images - 3.5)
    return special.expit(2.6 + effect[member] + 0.6 * generator.normal(size=len(member))), member


def failures(generator: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Like `skewed`, but all images of one patient in ten score 40 % less."""
    scores, member = skewed(generator, count)
    failed = generator.uniform(size=count) < 0.1
    return np.where(failed[member], 0.6 * scores, scores), member


def perfect(generator: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Like `skewed`, but all images of seven patients in ten score exactly 1."""
    scores, member = skewed(generator, count)
    right = generator.uniform(size=count) < 0.7
    return np.where(right[member], 1.0, scores), member


POPULATIONS: dict[str, Draw] = {draw.__name__: draw for draw in (normal, skewed, linked, failures, perfect)}


def percentile(scores: np.ndarray, member: np.ndarray, seed: int) -> tuple[float, float]:
    sizes, sums = np.bincount(member), np.bincount(member, weights=scores)
    drawn = np.random.default_rng(seed).integers(len(sizes), size=(RESAMPLES, len(sizes)))
    low, high = np.quantile(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1), [0.025, 0.975])
    return float(low), float(high)


def coverage(draw: Draw, patients: int, datasets: int) -> dict[str, float]:
    """Share of datasets whose interval contains the true mean, and median width of the intervals."""
    truth = float(np.mean(draw(np.random.default_rng(0), LARGE)[0]))
    ours, theirs = [], []
    for number in range(datasets):
        scores, member = draw(np.random.default_rng([1, patients, number]), patients)
        ours.append(interval(scores, member.astype(str).tolist(), number, bounds=(0.0, 1.0)))
        theirs.append(percentile(scores, member, number))
    lows, highs = np.asarray(ours).T
    return {
        "coverage": float(np.mean((lows <= truth) & (truth <= highs))),
        "too_high": float(np.mean(truth < lows)),
        "too_low": float(np.mean(highs < truth)),
        "width": float(np.median(highs - lows)),
        "percentile_coverage": float(np.mean([low <= truth <= high for low, high in theirs])),
        "percentile_width": float(np.median([high - low for low, high in theirs])),
    }


def table(figures: dict[str, dict[str, dict[str, float]]]) -> str:
    """One line per number of patients: coverage in each population, in brackets for the percentile interval."""
    names = list(figures)
    lines = ["patients  " + "".join(f"{name:>18}" for name in names)]
    for patients in figures[names[0]]:
        cells = (figures[name][patients] for name in names)
        words = (f"{cell['coverage']:.3f} ({cell['percentile_coverage']:.3f})" for cell in cells)
        lines.append(f"{patients:>8}  " + "".join(f"{word:>18}" for word in words))
    return "\n".join(lines)


def main() -> None:
    """Run the command."""
    options = tyro.cli(Options, prog="python -m benchmarks.coverage")
    figures = {
        name: {str(count): coverage(draw, count, options.datasets) for count in options.patients}
        for name, draw in POPULATIONS.items()
    }
    print(table(figures))
    settings: dict[str, Any] = {**asdict(options), "resamples": RESAMPLES}
    del settings["output"]
    result = {"benchmark": "coverage", "settings": settings, "machine": machine.facts(), "populations": figures}
    output.write(result, options.output)


if __name__ == "__main__":
    main()
