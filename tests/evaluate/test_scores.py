import json
import math
import re

import pytest

from pdrunet_jax.evaluate.scores import (
    METRICS,
    OVERLAP,
    ImageScores,
    ScoringOptions,
    aligned,
    dice_line,
    image_means,
    score_table,
    statistic,
    summarise,
)


def row(image, dice, patient=None, name="bone", true=10, predicted=10):
    overlap = dict.fromkeys(OVERLAP, dice)
    apart = {"hd95": 3.0, "assd": 1.0, "nsd": dice, "area_error": -0.1}
    return ImageScores(image, patient or image, name, **overlap, **apart, pixels_true=true, pixels_predicted=predicted)


def test_dice_line_has_exactly_the_promised_form():
    rows = [row(f"{number}.png", 0.9 + 0.002 * number) for number in range(24)]
    line = dice_line("test", summarise(rows, ScoringOptions()))
    assert re.fullmatch(r"test dice 0\.923 \(95% 0\.\d{3}-0\.\d{3}, 24 images, 24 patients\)", line)


def test_dice_line_says_nan_where_one_patient_gives_no_interval():
    line = dice_line("val", summarise([row("a", 0.5, "p"), row("b", 0.7, "p")], ScoringOptions()))
    assert line == "val dice 0.600 (95% nan-nan, 2 images, 1 patients)"


def test_statistics_are_those_on_paper():
    values = statistic([0.2, 0.4, 0.9], ["a", "b", "c"])
    assert values.mean == pytest.approx(0.5)
    assert values.median == 0.4
    assert values.std == pytest.approx(math.sqrt((0.09 + 0.01 + 0.16) / 2))
    assert values.low < 0.5 < values.high


def test_macro_averages_the_classes_of_an_image_and_leaves_undefined_ones_out():
    rows = [
        row("1", 0.8, name="femur"),
        row("1", 0.4, name="tibia"),
        row("2", 0.6, name="femur"),
        row("2", math.nan, name="tibia"),
    ]
    assert image_means(rows) == pytest.approx({"1": 0.6, "2": 0.6})
    summary = summarise(rows, ScoringOptions())
    assert summary.classes["femur"]["dice"].mean == pytest.approx(0.7)
    assert summary.classes["tibia"]["dice"].images == 1
    assert summary.macro["dice"].mean == pytest.approx(0.6)


def test_images_without_truth_and_prediction_are_counted():
    summary = summarise([row("1", 1.0, true=0, predicted=0), row("2", 0.0, true=0), row("3", 0.9)], ScoringOptions())
    assert summary.empty == {"bone": 1}


def test_a_summary_is_valid_json_without_nan():
    summary = summarise([row("1", math.nan), row("2", math.nan)], ScoringOptions())
    values = json.loads(json.dumps(summary.to_dict(), allow_nan=False))
    assert values["macro"]["dice"]["mean"] is None
    assert values["classes"]["bone"]["dice"]["images"] == 0


def test_the_table_is_aligned_and_has_every_metric():
    rows = [row(image, 0.5, name=name) for image in "12" for name in ("femur", "tibia")]
    lines = aligned(score_table(summarise(rows, ScoringOptions()).to_dict()), words=2).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len(lines) == 1 + 3 * len(METRICS)
    assert "mean of classes  dice" in lines[1 + 2 * len(METRICS)]
