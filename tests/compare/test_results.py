"""Statistics over images and seeds, tables and cases, on scores made by hand."""

import math

import numpy as np
import pytest

from pdrunet_jax.compare import tables
from pdrunet_jax.compare.cases import Case, choose
from pdrunet_jax.compare.plan import Plan, PlannedModel
from pdrunet_jax.compare.results import compute, mean_by_image, to_csv
from pdrunet_jax.compare.speed import Speed
from pdrunet_jax.config import Config, ModelConfig
from pdrunet_jax.evaluate.report.charts import COLOURS, intervals, key_of
from pdrunet_jax.evaluate.scores import ImageScores

NAN = math.nan
DICE = {
    "a": {0: [0.5, 0.6, 0.7, 0.8], 1: [0.5, 0.8, 0.7, 0.8]},
    "b filters=3": {0: [0.6, 0.6, 0.9, 0.9], 1: [0.6, 1.0, 0.9, 0.9]},
}
"""Network to seed to the Dice of four images of three patients."""
ABOUT = {"unit": "pixels", "tolerance": 2.0, "seeds": [0, 1], "folds": 0, "budget": "steps"}


def row(image: int, dice: float, name: str = "bone") -> ImageScores:
    hd95 = NAN if image == 0 and dice == 0.5 else 10 * (1 - dice)
    rest = {"iou": 0.5, "precision": 0.5, "recall": 0.5, "specificity": 0.5, "assd": 1.0, "area_error": 0.0}
    counts = {"pixels_true": 5, "pixels_predicted": 5}
    return ImageScores(f"{image}.png", f"p{min(image, 2)}", name, dice=dice, hd95=hd95, nsd=dice / 2, **rest, **counts)


ROWS = {
    network: {seed: [row(*each) for each in enumerate(dice)] for seed, dice in of.items()}
    for network, of in DICE.items()
}
PLAN = Plan("", "steps", 0, tuple(PlannedModel(name, 10, ModelConfig()) for name in DICE), Config())
SPEEDS = {name: Speed(1000, 0.5 / number, 0.01, 1 << 20) for number, name in enumerate(DICE, 1)}


def test_scores_are_means_over_seeds_with_intervals_over_patients() -> None:
    values = compute(ROWS, PLAN, SPEEDS, ABOUT)
    a, b = values["models"]
    assert (values["images"], values["patients"], values["overall"]) == (4, 3, "bone")
    dice = a["scores"]["bone"]["dice"]
    assert dice["mean"] == pytest.approx(np.mean([0.5, 0.7, 0.7, 0.8]))
    assert dice["by_seed"] == pytest.approx([0.65, 0.7])
    assert dice["seed_sd"] == pytest.approx(np.std([0.65, 0.7], ddof=1))
    assert dice["low"] < dice["mean"] < dice["high"]
    assert (dice["images"], a["scores"]["bone"]["hd95"]["images"]) == (4, 3)  # undefined where nothing was found
    assert (a["training_seconds"], b["training_seconds"]) == (5.0, 2.5)
    assert any("hd95 is undefined" in note for note in tables.notes(values))


def test_differences_are_paired_by_image_and_read_from_both_sides() -> None:
    values = compute(ROWS, PLAN, SPEEDS, ABOUT)
    dice, _, hd95 = values["differences"]
    assert (dice["network"], dice["against"], dice["metric"]) == ("b filters=3", "a", "dice")
    assert dice["mean"] == pytest.approx(0.125)
    assert dice["by_seed"] == pytest.approx([0.1, 0.15])
    assert (dice["better"], dice["worse"], dice["equal"]) == (4, 0, 0)
    assert hd95["images"] == 3
    assert hd95["better"] == 3  # a shorter distance
    (_, _, above), (_, below, _) = tables.pair_table(values)[1:]
    assert below == "+0.125 (-0.125 to +0.375)"
    assert above == "-0.125 (-0.375 to +0.125)"
    first, second = tables.lines(values)
    assert first.startswith("a: dice 0.675 (95% ")
    assert "against" not in first
    assert ", +0.125 (95% " in second
    assert "against a, sd over seeds 0." in second
    assert [line[:2] for line in tables.difference_table(values)[1:]] == [
        ["dice", "b filters=3"],
        ["nsd (within 2 pixels)", "b filters=3"],
        ["hd95 (pixels)", "b filters=3"],
    ]


def test_several_classes_are_stated_apart_and_compared_by_their_mean() -> None:
    rows = {
        network: {seed: [*each, *(row(number, 0.4, "other") for number in range(4))] for seed, each in of.items()}
        for network, of in ROWS.items()
    }
    values = compute(rows, PLAN, SPEEDS, ABOUT)
    assert list(values["models"][0]["scores"]) == ["bone", "other", "mean of classes"]
    assert values["models"][0]["scores"]["mean of classes"]["dice"]["mean"] == pytest.approx((0.675 + 0.4) / 2)
    assert values["differences"][0]["mean"] == pytest.approx(0.125 / 2)
    assert tables.score_table(values)[0][:3] == ["class", "metric", "network"]
    assert mean_by_image(rows["a"])["0.png"] == pytest.approx(0.45)


def test_one_seed_is_called_so() -> None:
    values = compute({network: {0: of[0]} for network, of in ROWS.items()}, PLAN, SPEEDS, {**ABOUT, "seeds": [0]})
    assert "sd over seeds" not in "".join(tables.score_table(values)[0] + tables.lines(values))
    assert any("give more --seeds" in note for note in tables.notes(values))
    assert "with one seed (0)" in tables.caption(values)


def test_the_csv_has_every_score() -> None:
    head, *lines = to_csv(ROWS).splitlines()
    assert head.startswith("network,seed,image,patient,class,dice,")
    assert len(lines) == 16
    assert lines[0].startswith("a,0,0.png,p0,bone,0.500000,")


def test_cases_are_the_hardest_images_and_those_on_which_networks_differ_most() -> None:
    dice = {
        "a": {"w": 0.1, "x": 0.2, "y": 0.3, "same": 0.8, "little": 0.8, "much": 0.9, "none": NAN},
        "b": {"w": 0.1, "x": 0.9, "y": 0.3, "same": 0.8, "little": 0.7, "much": 0.5, "none": 0.0},
    }
    hard, apart = ["w", "y", "x"], ["much", "little"]
    assert choose(dice) == [*(Case("hard", image) for image in hard), *(Case("apart", image) for image in apart)]


def test_charts_of_intervals_take_any_number_of_rows_and_missing_ends() -> None:
    rows = [(f"<net {number}>", 0.5, NAN, NAN, [0.5]) for number in range(COLOURS + 1)]
    drawn = intervals("Dice", [*rows, ("last", 0.9, 0.8, 0.95, [])])
    assert drawn.count('class="dot') == COLOURS + 2
    assert drawn.count("<line") - drawn.count('class="grid"') == 1
    assert "&lt;net 0&gt;" in drawn
    assert "line-0 dashed" in drawn
    assert key_of(["a", "b"]).count("<path") == 2
