"""Calibration and threshold curves compared with hand-computed values."""

import json

import numpy as np
import pytest

from pdrunet_jax.config import DataConfig
from pdrunet_jax.data.dataset import open_dataset
from pdrunet_jax.data.masks import IGNORE
from pdrunet_jax.evaluate.calibration import THRESHOLDS, Histograms
from pdrunet_jax.evaluate.evaluation import evaluate_split
from pdrunet_jax.predict.threshold import apply_threshold
from tests.support.tiny import brightness_model, save_dataset


def counted(*images, empty=1.0):
    histograms = Histograms(["bone"], empty)
    for probability, truth in images:
        histograms.add(np.array([probability], np.float32), np.array([truth], np.uint8))
    return histograms.curves()["bone"]


def dice_at(curves, threshold):
    return curves.dice[THRESHOLDS.index(threshold)]


def test_probabilities_that_mean_what_they_say_have_no_calibration_error():
    curves = counted(([0.75] * 4 + [0.25] * 4, [1, 1, 1, 0, 0, 0, 0, 1]))
    assert curves.error == pytest.approx(0)
    assert [(each.low, each.high, each.share) for each in curves.reliability] == [(0.2, 0.3, 0.5), (0.7, 0.8, 0.5)]
    assert [each.frequency for each in curves.reliability] == [0.25, 0.75]


def test_the_calibration_error_is_the_mean_gap_over_pixels():
    """Six pixels of 0.95 of which three are true, two of 0.15 of which none is."""
    curves = counted(([0.95] * 6 + [0.15] * 2, [1, 1, 1, 0, 0, 0, 0, 0]))
    assert curves.error == pytest.approx(6 / 8 * 0.45 + 2 / 8 * 0.15)
    assert [each.probability for each in curves.reliability] == pytest.approx([0.15, 0.95])
    assert curves.pixels == 8


def test_dice_at_each_threshold_is_the_mean_over_images():
    """One image loses its only true pixel above 0.6, the other gains two false ones below 0.3."""
    curves = counted(([0.6, 0.1], [1, 0]), ([0.9, 0.3, 0.3], [1, 0, 0]))
    assert dice_at(curves, 0.2) == pytest.approx((1 + 2 * 1 / (3 + 1)) / 2)
    assert dice_at(curves, 0.5) == pytest.approx(1)
    assert dice_at(curves, 0.6) == pytest.approx((0 + 1) / 2)  # above the threshold is foreground, at it is not
    assert dice_at(curves, 0.95) == 0


def test_of_equally_good_thresholds_the_one_nearest_to_a_half_is_best():
    assert counted(([0.4, 0.2], [1, 0])).best == (0.39, 1.0)
    assert counted(([0.9, 0.7], [1, 0])).best == (0.7, 1.0)
    assert counted(([0.9, 0.1], [1, 0])).best == (0.5, 1.0)


def test_empty_masks_count_as_they_are_told_to():
    nothing, right = ([0.2], [0]), ([0.9], [1])
    assert dice_at(counted(nothing, right), 0.95) == 0.5
    assert dice_at(counted(nothing, right, empty=np.nan), 0.95) == 0
    assert dice_at(counted(nothing, right, empty=np.nan), 0.1) == pytest.approx(0.5)  # predicted, not true: 0
    alone = counted(nothing, empty=np.nan).to_dict()
    assert alone["dice"][50] is None
    json.dumps(alone, allow_nan=False)


def test_no_pixel_makes_curves_without_values():
    curves = counted().to_dict()
    assert (curves["pixels"], curves["expected_calibration_error"], curves["reliability"]) == (0, None, [])
    assert set(curves["dice"]) == {None}


def test_histogram_columns_decide_as_a_threshold_does_to_the_last_bit():
    limits = np.asarray(THRESHOLDS, np.float32)
    probability = np.concatenate([limits, np.nextafter(limits, np.float32(2)), np.float32([0, 1])])
    truth = np.arange(len(probability)) % 3 == 0
    curves = counted((probability, truth))
    for threshold in THRESHOLDS:
        predicted = apply_threshold(probability[None], threshold)[0].astype(bool)
        expected = 2 * np.sum(predicted & truth) / (predicted.sum() + truth.sum())
        assert dice_at(curves, threshold) == pytest.approx(expected)


def test_each_class_is_held_against_the_rest_and_ignored_pixels_are_left_out():
    histograms = Histograms(["a", "b"])
    probability = np.array([[[0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [0.9, 0.0, 0.1]]], np.float32)
    histograms.add(probability, np.array([[1, 2, IGNORE]]))
    curves = histograms.curves()
    assert (curves["a"].pixels, dice_at(curves["a"], 0.5), dice_at(curves["b"], 0.5)) == (2, 1, 1)
    assert dice_at(curves["b"], 0.7) == 0


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.97])
def test_the_curve_goes_through_the_score_that_an_evaluation_reports(tmp_path, threshold):
    config = DataConfig(root=str(save_dataset(tmp_path, errors={3: 2, 4: 3}, ignore=False)), size=(12, 16), threads=1)
    evaluation = evaluate_split(brightness_model(), open_dataset(config), "test", config, threshold=threshold)
    curve = evaluation.curves["square"]
    assert dice_at(curve, threshold) == pytest.approx(evaluation.summary.macro["dice"].mean)
    assert curve.pixels == 3 * 24 * 32
