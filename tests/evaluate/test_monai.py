"""Scores compared with MONAI's: where they agree, and the known differences."""

import math
import warnings
from collections import defaultdict

import numpy as np
import pytest
import torch

from pdrunet_jax.evaluate import metrics
from pdrunet_jax.evaluate.scores import OVERLAP
from pdrunet_jax.evaluate.surface import distances
from tests.support.tiny import blobs

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # MONAI uses deprecated APIs of PyTorch and Python
    from monai import metrics as monai
    from monai.metrics.utils import get_edge_surface_distance

pytestmark = pytest.mark.filterwarnings("ignore")  # about its own deprecated arguments and empty masks


def overlap_of_monai(prediction, truth):
    counts = monai.get_confusion_matrix(
        prediction.float(), truth.float()
    )  # in boolean masks it counts no true positives
    return {
        "dice": monai.compute_dice(prediction, truth, ignore_empty=False),
        "iou": monai.compute_iou(prediction, truth, ignore_empty=False),
        **{name: monai.compute_confusion_matrix_metric(name, counts) for name in OVERLAP[2:]},
    }


def distances_of_monai(prediction, truth, spacing, tolerance):
    settings = {"include_background": True, "spacing": spacing}
    return {
        "hd95": monai.compute_hausdorff_distance(prediction, truth, percentile=95, **settings),
        "assd": monai.compute_average_surface_distance(prediction, truth, symmetric=True, **settings),
        "nsd": monai.compute_surface_dice(prediction, truth, class_thresholds=[tolerance], **settings),
    }


def test_500_random_pairs_agree_with_monai():
    rng = np.random.default_rng(0)
    largest = defaultdict(float)
    for number in range(500):
        shape = tuple(int(side) for side in rng.integers(5, 70, 2))
        pair = blobs(rng, shape), blobs(rng, shape)
        spacing = None if number % 2 else tuple(float(value) for value in rng.uniform(0.1, 2, 2))
        tolerance = float(rng.integers(0, 4)) if spacing is None else float(rng.uniform(0, 3))
        tensors = [torch.from_numpy(mask)[None, None] for mask in pair]
        counts = metrics.confusion(*(mask[None].astype(np.uint8) for mask in pair), np.ones((1, *shape), bool), 1)
        ours = {
            **{name: getattr(metrics, name)(counts).item() for name in OVERLAP},
            **vars(distances(*pair, spacing=spacing, tolerance=tolerance)),
        }
        theirs = {**overlap_of_monai(*tensors), **distances_of_monai(*tensors, spacing, tolerance)}
        sides = get_edge_surface_distance(*(mask[0, 0] for mask in tensors), spacing=spacing, symmetric=True)[1]
        exact = max(np.quantile(side.numpy().astype(np.float64), 0.95) for side in sides)
        theirs["hd95 of their distances"], ours["hd95 of their distances"] = torch.tensor(exact), ours["hd95"]
        assert theirs.keys() == ours.keys()
        for name, value in theirs.items():
            largest[name] = max(largest[name], abs(value.item() - ours[name]) / max(abs(ours[name]), 1e-9))
    # MONAI's percentile interpolates ranks in float32.
    assert largest.pop("hd95") < 3e-6
    assert max(largest.values()) < 1e-6


def test_on_empty_masks_monai_has_infinite_distances_and_undefined_dice_where_ours_say_nan_and_0():
    nothing, something = torch.zeros(1, 1, 9, 9, dtype=torch.bool), torch.ones(1, 1, 9, 9, dtype=torch.bool)
    for pair in ((nothing, something), (something, nothing)):
        theirs = [value.item() for value in distances_of_monai(*pair, None, 1.0).values()]
        assert theirs == pytest.approx([math.nan, math.inf, 0], nan_ok=True)
        assert monai.compute_hausdorff_distance(*pair, include_background=True).item() == math.inf
    assert all(math.isnan(value.item()) for value in distances_of_monai(nothing, nothing, None, 1.0).values())
    assert monai.compute_dice(nothing, nothing, ignore_empty=False).item() == 1
    assert math.isnan(monai.compute_dice(nothing, nothing).item())
    assert math.isnan(monai.compute_dice(something, nothing).item())  # here, a false positive has Dice 0
    assert monai.compute_dice(something, nothing, ignore_empty=False).item() == 0
    assert monai.compute_iou(nothing, nothing, ignore_empty=False).item() == 1
    assert math.isnan(overlap_of_monai(nothing, something)["precision"].item())
    assert math.isnan(overlap_of_monai(something, nothing)["recall"].item())


def test_monai_counts_no_hits_in_booleans():
    something = torch.ones(1, 1, 9, 9, dtype=torch.bool)
    assert monai.get_confusion_matrix(something, something)[0, 0, 0].item() == 0
    assert monai.get_confusion_matrix(something.float(), something.float())[0, 0, 0].item() == 81
