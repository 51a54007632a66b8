"""Class weights from the training masks: `loss.class_weights = "balanced"`."""

import dataclasses

from pdrunet_jax.config import Config
from pdrunet_jax.data.dataset import Dataset
from pdrunet_jax.runtime.errors import DataError


def balance(config: Config, dataset: Dataset) -> Config:
    """The settings with the numbers of `balanced_weights` in place of "balanced". Raises as that."""
    if config.loss.class_weights != "balanced":
        return config
    return dataclasses.replace(config, loss=dataclasses.replace(config.loss, class_weights=balanced_weights(dataset)))


def balanced_weights(dataset: Dataset) -> tuple[float, ...]:
    """`loss.class_weights` with which each class has the same weight in all training masks together.

    Exclusive classes have 1 / (classes * share), background included, as in scikit-learn. Of overlapping classes each
    has two weights, 1 / (2 * share), outside and inside it. Shares are those of `Dataset.class_shares`. The weights are
    rounded to four digits: given as numbers, they do the same.

    Raises:
        DataError: some class is in no training mask, or fills all of them.
    """
    shares = dataset.class_shares("train")
    names = dataset.class_names if dataset.multilabel else ("background", *dataset.class_names)
    problems = [
        f"{name} {'fills every training mask' if share else 'is in no training mask'}"
        for name, share in zip(names, shares, strict=True)
        if not 0 < share < 1
    ]
    if problems:
        raise DataError("loss.class_weights = balanced needs every class; give numbers instead", problems)
    if dataset.multilabel:
        weights = [1 / (2 * part) for share in shares for part in (1 - share, share)]
    else:
        weights = [1 / (len(shares) * share) for share in shares]
    return tuple(float(f"{weight:.4g}") for weight in weights)


def describe_weights(weights: tuple[float, ...], dataset: Dataset) -> str:
    """One line on `weights` that were computed."""
    if dataset.multilabel:
        pairs = zip(dataset.class_names, weights[::2], weights[1::2], strict=True)
        each = [f"{name} {outside:g} outside, {inside:g} inside" for name, outside, inside in pairs]
    else:
        names = ("background", *dataset.class_names)
        each = [f"{name} {weight:g}" for name, weight in zip(names, weights, strict=True)]
    return f"class weights from {len(dataset.of('train'))} training masks: {'; '.join(each)}"
