"""Every score of shapes with hand-computable scores, and per_image.csv."""

import math

import numpy as np
import pytest

from pdrunet_jax.data.masks import IGNORE
from pdrunet_jax.evaluate.scores import METRICS, ImageScores, ScoringOptions, read_csv, score, to_csv
from pdrunet_jax.runtime.errors import UserError

SHAPE = (121, 131)
NAN = math.nan


def square(top, left, side):
    mask = np.zeros(SHAPE, np.uint8)
    mask[top : top + side, left : left + side] = 1
    return mask


def disc(radius):
    row, column = np.mgrid[: SHAPE[0], : SHAPE[1]] - 60
    return (row**2 + column**2 <= radius**2).astype(np.uint8)


def scored(predicted, truth, spacing=None, **rules):
    (row,) = score("image", "patient", predicted, truth, ["bone"], ScoringOptions(**rules), spacing)
    return {metric: getattr(row, metric) for metric in METRICS}


def test_a_square_shifted_by_3_of_its_20_columns_has_the_scores_on_paper():
    pixels = SHAPE[0] * SHAPE[1]
    sticking_out, inner = 2 * (1 + 2 + 3) + 18 * 3, sum(min(3, row, 19 - row) for row in range(1, 19))
    expected = {
        "dice": 17 / 20,
        "iou": 17 / 23,
        "precision": 17 / 20,
        "recall": 17 / 20,
        "specificity": 1 - 60 / (pixels - 400),
        "hd95": 3,
        "assd": (sticking_out + inner) / 76,
        # Further than 2, per square: the far edge's 20 pixels, and 14 of the near edge, at least 3 rows from its ends.
        "nsd": 1 - (20 + 14) / 76,
        "area_error": 0,
    }
    assert scored(square(30, 40, 20), square(30, 43, 20)) == pytest.approx(expected)


def test_a_shift_down_is_longer_where_rows_are_further_apart():
    here, there = square(30, 40, 20), square(33, 40, 20)
    assert scored(here, there, spacing=(0.5, 0.2), unit="mm")["hd95"] == 1.5
    assert scored(here.T, there.T, spacing=(0.5, 0.2), unit="mm")["hd95"] == pytest.approx(0.6)


@pytest.mark.parametrize(("small", "large"), [(20, 25), (30, 50)])
def test_two_discs_have_the_scores_of_their_radii(small, large):
    areas = small**2, large**2
    inside = scored(disc(small), disc(large))
    assert inside["dice"] == pytest.approx(2 * areas[0] / sum(areas), rel=0.01)
    assert inside["iou"] == inside["recall"] == pytest.approx(areas[0] / areas[1], rel=0.01)
    assert inside["precision"] == inside["specificity"] == 1
    assert inside["area_error"] == pytest.approx(areas[0] / areas[1] - 1, rel=0.01)
    assert inside["hd95"] == pytest.approx(large - small, abs=1)
    assert inside["assd"] == pytest.approx(large - small, abs=0.5)
    assert inside["nsd"] == 0
    outside = scored(disc(large), disc(small), tolerance=large - small + 1)
    assert (outside["recall"], outside["nsd"]) == (1, 1)
    assert outside["precision"] == inside["recall"]
    assert outside["area_error"] == pytest.approx(areas[1] / areas[0] - 1, rel=0.02)


def test_two_single_pixels_are_right_nowhere_and_5_apart():
    expected = dict.fromkeys(METRICS, 0.0) | {"hd95": 5, "assd": 5, "specificity": 1 - 1 / (SHAPE[0] * SHAPE[1] - 1)}
    assert scored(square(10, 20, 1), square(13, 24, 1)) == pytest.approx(expected)
    assert scored(square(10, 20, 1), square(13, 24, 1), tolerance=5)["nsd"] == 1


def test_equal_masks_are_perfect():
    perfect = dict.fromkeys(METRICS, 1.0) | {"hd95": 0, "assd": 0, "area_error": 0}
    assert scored(disc(20), disc(20)) == perfect


@pytest.mark.parametrize(
    ("predicted", "truth", "expected"),
    [
        (0, 0, {"dice": 1, "iou": 1, "precision": NAN, "recall": NAN, "nsd": NAN, "area_error": NAN}),
        (0, 1, {"dice": 0, "iou": 0, "precision": NAN, "recall": 0, "nsd": 0, "area_error": -1}),
        (1, 0, {"dice": 0, "iou": 0, "precision": 0, "recall": NAN, "nsd": 0, "area_error": NAN}),
    ],
)
def test_empty_masks_score_as_the_page_on_metrics_says(predicted, truth, expected):
    values = scored(square(30, 40, 20) * predicted, square(30, 43, 20) * truth)
    specificity = 1 - 400 * predicted / (SHAPE[0] * SHAPE[1])
    assert values == pytest.approx({**expected, "hd95": NAN, "assd": NAN, "specificity": specificity}, nan_ok=True)


def test_dice_and_iou_of_two_empty_masks_are_as_configured():
    nothing = np.zeros(SHAPE, np.uint8)
    assert scored(nothing, nothing, empty_dice=0.5)["dice"] == 0.5
    assert math.isnan(scored(nothing, nothing, empty_dice=NAN)["iou"])


def test_ignored_pixels_belong_to_neither_mask():
    truth, predicted = square(30, 40, 20), square(30, 40, 20)
    predicted[:10, :10] = 1
    truth[:10, :10] = IGNORE
    assert scored(predicted, truth) == scored(square(30, 40, 20), square(30, 40, 20))


def test_classes_are_scored_apart():
    truth, predicted = square(10, 10, 10) + 2 * square(50, 50, 20), square(10, 10, 10)
    first, second = score("image", "patient", predicted, truth, ["femur", "tibia"], ScoringOptions())
    assert (first.class_name, first.dice, first.hd95) == ("femur", 1, 0)
    assert (second.class_name, second.dice, second.pixels_true, second.pixels_predicted) == ("tibia", 0, 400, 0)


def test_the_table_reads_back_as_it_was_written(tmp_path):
    rows = [
        *score("a,b.png", "p\n1", square(30, 40, 20), square(30, 44, 20), ["bone"], ScoringOptions()),
        *score("ü.png", "p2", square(0, 0, 0), square(30, 44, 20), ["bone"], ScoringOptions()),
    ]
    path = tmp_path / "per_image.csv"
    path.write_text(to_csv(rows), encoding="utf-8")
    back = read_csv(path)
    assert [row.image for row in back] == ["a,b.png", "ü.png"]
    for row, other in zip(rows, back, strict=True):
        values, others = ([getattr(one, metric) for metric in METRICS] for one in (row, other))
        assert others == pytest.approx(values, abs=5e-7, nan_ok=True)
    assert (back[1].patient, back[1].pixels_true) == ("p2", 400)
    assert isinstance(back[0], ImageScores)


def test_a_table_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.csv: cannot be read \(No such file"):
        read_csv(tmp_path / "nowhere.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"binary.csv"):
        read_csv(tmp_path / "binary.csv")
