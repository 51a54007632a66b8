"""Images to look at: those that all networks find hard, and those on which they differ most, with every mask."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pdrunet_jax.compare.plan import Plan
from pdrunet_jax.compare.trainings import runs_of, training_folder
from pdrunet_jax.config import DataConfig
from pdrunet_jax.data import overlay
from pdrunet_jax.data.dataset import Dataset
from pdrunet_jax.data.images import read_image
from pdrunet_jax.data.layers import read_truth
from pdrunet_jax.data.split import Sample
from pdrunet_jax.evaluate.evaluation import predicted_probabilities
from pdrunet_jax.model.load import load_model
from pdrunet_jax.predict.threshold import apply_threshold
from pdrunet_jax.runtime.files import require_inside, writing

WORST, APART = 3, 3
"""Images with the lowest mean Dice of all networks, and further ones with the largest range of Dice."""
_IMAGE, _TRUTH, _MASK, _DIFFERENCE = range(len(overlay.PANELS))


class Case(NamedTuple):
    """An image to look at."""

    kind: str
    """"hard" or "apart"."""
    image: str


def choose(dice: Mapping[str, Mapping[str, float]]) -> list[Case]:
    """Choose cases by `dice[network][image]`, without images whose Dice any network leaves undefined."""
    table = {image: [of[image] for of in dice.values()] for image in next(iter(dice.values()))}
    table = {image: values for image, values in table.items() if not any(map(math.isnan, values))}
    hard = sorted(table, key=lambda image: sum(table[image]))[:WORST]
    others = [image for image in table if image not in hard and max(table[image]) > min(table[image])]
    apart = sorted(others, key=lambda image: min(table[image]) - max(table[image]))[:APART]
    return [*(Case("hard", image) for image in hard), *(Case("apart", image) for image in apart)]


def write_cases(
    cases: Sequence[Case], folder: Path, plan: Plan, dataset: Dataset, config: DataConfig, seed: int
) -> list[dict[str, Any]]:
    """Draw the cases, with the mask of every network trained with `seed`, into the folder cases/ of the comparison.

    `dataset` has its folds if `plan` has them, and `config` is that of training. Returns the cases as JSON values:
    "image", "kind", and "panels", names of the files: image, truth, then the difference of each network. Raises
    `RunError` if they cannot be written.
    """
    require_inside(folder, folder / "cases")
    samples = {sample.id: sample for sample in dataset.samples}
    chosen = [samples[case.image] for case in cases]
    masks: dict[str, list[np.ndarray]] = defaultdict(list)
    for model in plan.models:
        for image, mask in _masks(training_folder(folder, model, seed), plan, dataset, config, chosen):
            masks[image].append(mask)
    entries = []
    with writing(folder / "cases"):
        (folder / "cases").mkdir(exist_ok=True)
        for number, case in enumerate(cases, 1):
            sample = samples[case.image]
            pixels, truth = read_image(sample.image, 1), read_truth(sample, dataset.coding)
            drawn = [overlay.panels(pixels, truth, mask) for mask in masks[case.image]]
            pictures = [drawn[0][_IMAGE], drawn[0][_TRUTH], *(each[_DIFFERENCE] for each in drawn)]
            names = [
                f"cases/{number}_{name}.png" for name in ("image", "truth", *(each.folder for each in plan.models))
            ]
            for name, picture in zip(names, pictures, strict=True):
                overlay.save(picture, folder / name)
            entries.append({**case._asdict(), "panels": names})
    return entries


def _masks(
    path: Path, plan: Plan, dataset: Dataset, config: DataConfig, samples: Sequence[Sample]
) -> Iterator[tuple[str, np.ndarray]]:
    """Image and predicted mask of `samples`, each by the network of the training in `path` that tests on it."""
    for number, run in enumerate(runs_of(path, plan), 1):
        own = tuple(sample for sample in samples if not plan.folds or sample.fold == number)
        if not own:
            continue
        model = load_model(run.path)
        part = replace(dataset, samples=own)
        for sample, probability, _ in predicted_probabilities(model, part, "all", config, batch_size=len(own)):
            yield sample.id, apply_threshold(probability, 0.5, multilabel=model.multilabel)
