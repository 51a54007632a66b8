from pathlib import Path

import jax
import numpy as np
import pytest

from pdrunet_jax.config import Config, LossConfig, from_dict
from pdrunet_jax.data.dataset import Dataset
from pdrunet_jax.data.layers import LayersCoding
from pdrunet_jax.data.masks import MaskCoding
from pdrunet_jax.data.split import Sample
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.train.class_weights import balance, balanced_weights, describe_weights
from pdrunet_jax.train.losses import make_loss
from pdrunet_jax.train.options import parse

BALANCED = from_dict({"loss": {"class_weights": "balanced"}}, "test")


def dataset(names: tuple[str, ...], *shares: tuple[float, ...], overlapping: bool = False) -> Dataset:
    samples = tuple(Sample(f"{n}", Path("x"), Path("y"), f"{n}", "train", shares=each) for n, each in enumerate(shares))
    other = Sample("v", Path("x"), Path("y"), "v", "val", shares=(0.0, *(1.0 for _ in names)))
    coding = LayersCoding() if overlapping else MaskCoding()
    return Dataset(Path("data"), "data", names, coding, (*samples, other), ())


def test_each_class_has_the_same_weight_in_all_training_masks() -> None:
    data = dataset(("bone",), (0.95, 0.05), (0.85, 0.15), (0.0, 0.0))  # the third is ignored as a whole
    assert balanced_weights(data) == (0.5556, 5.0)
    assert describe_weights((0.5556, 5.0), data) == "class weights from 3 training masks: background 0.5556; bone 5"
    three = dataset(("a", "b"), (0.5, 0.25, 0.25))
    assert balanced_weights(three) == (0.6667, 1.333, 1.333)
    settled = balance(BALANCED, three)
    assert settled.loss.class_weights == (0.6667, 1.333, 1.333)
    assert balance(Config(), three) == Config()


def test_overlapping_classes_are_balanced_one_by_one() -> None:
    data = dataset(("a", "b"), (np.nan, 0.25, 0.0), (np.nan, 0.75, 0.2), overlapping=True)
    weights = balanced_weights(data)
    assert weights == (1.0, 1.0, 0.5556, 5.0)
    assert describe_weights(weights, data).endswith("a 1 outside, 1 inside; b 0.5556 outside, 5 inside")


def test_a_class_in_no_training_mask_is_named() -> None:
    with pytest.raises(UserError, match=r"give numbers instead.*\n.*b is in no training mask"):
        balanced_weights(dataset(("a", "b"), (0.5, 0.5, 0.0)))
    with pytest.raises(UserError, match="background is in no training mask"):
        balanced_weights(dataset(("a",)))  # no training images at all, or none that counts
    with pytest.raises(UserError, match="a fills every training mask"):
        balanced_weights(dataset(("a", "b"), (np.nan, 1.0, 0.5), overlapping=True))


def test_two_weights_a_class_are_those_of_one_output_for_each() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    logits = jax.random.normal(keys[0], (2, 6, 5, 2))
    target = jax.random.bernoulli(keys[1], 0.3, logits.shape).astype(float)
    valid = jax.random.bernoulli(keys[2], 0.8, logits.shape)
    pairs = ((1.0, 4.0), (0.5, 2.0))
    for name in ("bce", "focal", "dice"):
        both = make_loss(LossConfig(name=name, class_weights=(*pairs[0], *pairs[1])), 2, multilabel=True)
        alone, sizes = [], []
        for place, pair in enumerate(pairs):
            one = make_loss(LossConfig(name=name, class_weights=pair), 1)
            alone.append(float(one(logits[..., place : place + 1], target[..., place], valid[..., place])))
            weight = pair[1] * target[..., place] + pair[0] * (1 - target[..., place])
            counted = {"bce": weight, "focal": 1.0, "dice": 1 / valid[..., place].sum()}[name]
            sizes.append(float((counted * valid[..., place]).sum()))
        assert float(both(logits, target, valid)) == pytest.approx(np.average(alone, weights=sizes), rel=1e-5)
    with pytest.raises(UserError, match="needs 2, one a class, or 4, two a class"):
        make_loss(LossConfig(class_weights=(1, 1, 1)), 2, multilabel=True)


def test_weights_are_given_as_a_word_or_as_numbers() -> None:
    for given, expected in (("balanced", "balanced"), ("1 2.5", (1.0, 2.5))):
        settings = parse(["--config", "mura", "--loss.class-weights", *given.split()]).settings
        assert settings.loss.class_weights == expected
    with pytest.raises(UserError, match=r"loss\.class_weights"):
        from_dict({"loss": {"class_weights": "even"}}, "test")
