import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdrunet_jax.evaluate import metrics
from pdrunet_jax.evaluate.metrics import confusion, dice, iou, precision, recall, specificity
from pdrunet_jax.model.pixels import predict_classes, probabilities

TRUTH = np.array([[[1, 1, 0, 0], [1, 1, 0, 0]]])
PREDICTION = np.array([[[0, 1, 1, 0], [0, 1, 0, 0]]])
EVERYWHERE = np.ones_like(TRUTH, bool)


def test_counts_are_those_on_paper():
    counts = confusion(PREDICTION, TRUTH, EVERYWHERE, 1)
    assert [int(value[0, 0]) for value in counts] == [2, 1, 2, 3]


def test_metrics_are_those_on_paper():
    counts = confusion(PREDICTION, TRUTH, EVERYWHERE, 1)
    expected = {dice: 4 / 7, iou: 2 / 5, precision: 2 / 3, recall: 2 / 4, specificity: 3 / 4}
    for metric, value in expected.items():
        assert metric(counts).item() == pytest.approx(value, abs=1e-15)


def test_ignored_pixels_count_nowhere():
    truth = np.where(TRUTH == 1, 255, 0)
    truth[0, :, 1] = 1
    counts = confusion(PREDICTION, truth, truth != 255, 1)
    assert [int(value[0, 0]) for value in counts] == [2, 1, 0, 3]


def test_classes_are_counted_apart():
    truth = np.array([[[0, 1, 2, 2]]])
    prediction = np.array([[[0, 2, 2, 1]]])
    counts = confusion(prediction, truth, np.ones_like(truth, bool), 2)
    np.testing.assert_array_equal(counts.tp, [[0, 1]])
    np.testing.assert_array_equal(counts.fp, [[1, 1]])
    np.testing.assert_array_equal(counts.fn, [[1, 1]])
    np.testing.assert_array_equal(counts.tn, [[2, 1]])


def test_both_empty_is_one_by_default_and_nan_on_request():
    counts = confusion(np.zeros_like(TRUTH), np.zeros_like(TRUTH), EVERYWHERE, 1)
    assert dice(counts).item() == iou(counts).item() == 1
    assert math.isnan(dice(counts, empty=math.nan).item())
    assert math.isnan(iou(counts, empty=math.nan).item())
    assert math.isnan(precision(counts).item())
    assert math.isnan(recall(counts).item())
    assert specificity(counts).item() == 1


@pytest.mark.parametrize(("prediction", "truth"), [(PREDICTION, np.zeros_like(TRUTH)), (np.zeros_like(TRUTH), TRUTH)])
def test_one_empty_is_zero(prediction, truth):
    counts = confusion(prediction, truth, EVERYWHERE, 1)
    assert dice(counts).item() == iou(counts).item() == 0


def test_one_output_at_batch_one_gives_the_public_codes_dice():
    """It rounds the sigmoid and the target, and takes 2 sum(p t) / (sum(p) + sum(t))."""
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(1, 9, 7, 1)).astype(np.float32)
    target = generator.uniform(size=(1, 9, 7)).astype(np.float32)
    rounded, truth = np.round(1 / (1 + np.exp(-logits[..., 0]))), np.round(target)
    public = 2 * (rounded * truth).sum() / (rounded.sum() + truth.sum())
    ours = dice(confusion(predict_classes(logits), truth.astype(np.int32), np.ones(truth.shape, bool), 1))
    assert ours.item() == pytest.approx(float(public), abs=1e-6)


def test_a_probability_of_one_half_is_background():
    assert predict_classes(np.zeros((1, 1, 1, 1))).item() == 0
    assert predict_classes(np.full((1, 1, 1, 1), 1e-6)).item() == 1


def test_the_likeliest_class_wins():
    logits = np.array([[0.1, 0.2, 0.1], [3.0, -1.0, 2.0], [0.0, 0.0, 0.5]]).reshape(1, 1, 3, 3)
    np.testing.assert_array_equal(predict_classes(logits), [[[1, 0, 2]]])


@pytest.mark.parametrize("outputs", [1, 3])
def test_probabilities_of_extreme_logits_are_finite(outputs):
    logits = np.array([-1e4, -3.0, 0.0, 2.0, 1e4], np.float32)
    logits = np.stack([np.roll(logits, shift) for shift in range(outputs)], axis=-1).reshape(1, 1, 5, outputs)
    values = probabilities(logits)
    assert np.isfinite(values).all()
    if outputs == 1:
        np.testing.assert_allclose(values.ravel(), [0, 0.04742587, 0.5, 0.8807971, 1], atol=1e-6)
    else:
        np.testing.assert_allclose(values.sum(axis=-1), 1, atol=1e-6)


@pytest.mark.parametrize("outputs", [1, 3])
def test_jit_agrees_with_numpy(outputs):
    generator = np.random.default_rng(1)
    logits = generator.normal(size=(3, 8, 6, outputs)).astype(np.float32)
    truth = generator.integers(0, max(outputs, 2), size=(3, 8, 6))
    valid = generator.uniform(size=truth.shape) > 0.2

    def all_metrics(logits, truth, valid):
        counts = confusion(predict_classes(logits), truth, valid, max(outputs - 1, 1))
        names = ("dice", "iou", "precision", "recall", "specificity")
        return {name: getattr(metrics, name)(counts) for name in names}

    compiled = jax.jit(all_metrics)(jnp.asarray(logits), jnp.asarray(truth), jnp.asarray(valid))
    for name, value in all_metrics(logits, truth, valid).items():
        assert isinstance(value, np.ndarray)
        assert value.shape == (3, max(outputs - 1, 1))
        np.testing.assert_allclose(np.asarray(compiled[name]), value, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(probabilities(jnp.asarray(logits))), probabilities(logits), rtol=1e-5)
