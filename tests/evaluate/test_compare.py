import csv
import dataclasses
import itertools
import json
import math

import numpy as np
import pytest

from pdrunet_jax.evaluate.__main__ import main
from pdrunet_jax.evaluate.compare import FLIPS, Other, compare, comparison_text, sign_flip
from pdrunet_jax.evaluate.scores import METRICS, OVERLAP, ImageScores, ScoringOptions
from pdrunet_jax.runtime.errors import UserError
from tests.support.tiny import brightness_model, save_dataset, save_model


def row(image, dice, patient=None, name="bone", **changes):
    overlap = dict.fromkeys(OVERLAP, dice)
    apart = {"hd95": 10 * (1 - dice), "assd": 5 * (1 - dice), "nsd": dice, "area_error": dice - 1}
    return dataclasses.replace(ImageScores(image, patient or image, name, **overlap, **apart, **PIXELS), **changes)


PIXELS = {"pixels_true": 10, "pixels_predicted": 10}


def compared(ours, theirs):
    return compare(ours, Other("other", tuple(theirs)), ScoringOptions())


def test_the_p_value_is_the_share_of_all_flips_as_large():
    sums = np.array([0.3, -0.1, 0.25, 0.4, 0.05])
    totals = [abs(np.dot(signs, sums)) for signs in itertools.product((-1, 1), repeat=5)]
    expected = np.mean([total >= abs(sums.sum()) - 1e-12 for total in totals])
    assert sign_flip(sums, list("abcde")) == expected
    assert sign_flip(np.array([0.3, 0.1, 0.2]), list("abc")) == 2 / 8


def test_the_test_flips_patients_and_not_images():
    images = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert sign_flip(images, list("abcdef")) == 2 / 64
    assert sign_flip(images, list("aabbcc")) == 2 / 8


def test_patients_without_a_difference_have_no_part_in_the_test():
    assert sign_flip(np.array([0.3, 0.1, 0.0, 0.2, -0.2]), list("abcdd")) == 2 / 4
    assert sign_flip(np.zeros(4), list("abcd")) == 1


def test_random_flips_agree_with_all_flips():
    generator = np.random.default_rng(0)
    differences = generator.normal(0.3, 1, size=17)
    signs = np.array(list(itertools.product((-1, 1), repeat=17)), np.int8)
    exact = np.mean(np.abs(signs @ differences) >= abs(differences.sum()) - 1e-12)
    p = sign_flip(differences, [str(number) for number in range(17)], seed=1)
    assert p == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / FLIPS))


def test_without_an_effect_p_values_are_at_most_as_often_small_as_they_say():
    generator = np.random.default_rng(0)
    p = [sign_flip(generator.normal(size=30), [str(n // 3) for n in range(30)]) for _ in range(600)]
    assert 0.03 < np.mean(np.array(p) <= 0.05) < 0.07


def test_differences_are_those_on_paper():
    ours = [row("1", 0.9, "a"), row("2", 0.6, "a"), row("3", 0.8, "b")]
    theirs = [row("3", 0.8, "b"), row("1", 0.5, "a"), row("2", 0.7, "a")]
    comparison = compared(ours, theirs)
    dice, hd95 = comparison.classes["bone"]["dice"], comparison.classes["bone"]["hd95"]
    assert dice.mean == pytest.approx(0.1)
    assert (dice.this, dice.other) == pytest.approx((2.3 / 3, 2.0 / 3))
    assert (dice.better, dice.worse, dice.equal, dice.images, dice.patients) == (1, 1, 1, 3, 2)
    assert hd95.mean == pytest.approx(-1)
    assert (hd95.better, hd95.worse, hd95.equal) == (1, 1, 1)
    assert dice.low < dice.mean < dice.high
    assert [case["image"] for case in comparison.changed] == ["1", "2"]


def test_an_area_too_small_and_one_too_large_by_as_much_are_equal():
    ours, theirs = [row("1", 0.9, area_error=0.2)], [row("1", 0.9, area_error=-0.2)]
    assert compared(ours, theirs).classes["bone"]["area_error"].equal == 1


def test_scores_that_one_side_does_not_define_are_left_out():
    ours = [row("1", 0.9), row("2", 0.8), row("3", 0.7)]
    theirs = [row("1", 0.8), row("2", 0.0, hd95=math.nan, assd=math.nan), row("3", 0.8)]
    metrics = compared(ours, theirs).classes["bone"]
    assert (metrics["dice"].images, metrics["hd95"].images) == (3, 2)


def test_the_mean_of_classes_is_over_those_that_both_define():
    ours = [row("1", 0.9, name="femur"), row("1", 0.3, name="tibia")]
    theirs = [row("1", 0.8, name="femur"), row("1", math.nan, name="tibia")]
    comparison = compared(ours, theirs)
    assert comparison.macro["dice"].mean == pytest.approx(0.1)
    assert "mean of classes" in comparison_text(comparison)


def test_an_evaluation_against_itself_has_no_difference():
    rows = [row(str(number), 0.9 - 0.01 * number) for number in range(5)]
    comparison = compared(rows, rows)
    dice = comparison.classes["bone"]["dice"]
    assert (dice.mean, dice.low, dice.high, dice.p, dice.equal) == (0, 0, 0, 1, 5)
    assert comparison_text(comparison).endswith("Dice is equal on every image")


def test_images_that_only_one_side_has_are_named():
    with pytest.raises(UserError, match=r"1 missing from other: 2 \(bone\); 1 missing here: 3 \(bone\)"):
        compared([row("1", 0.9), row("2", 0.9)], [row("1", 0.9), row("3", 0.9)])


def test_evaluations_by_other_rules_are_not_compared():
    other = Other("other", (row("1", 0.9),), ScoringOptions("mm", 2.0, math.nan))
    with pytest.raises(UserError, match=r"distances in mm, --tolerance 2, --empty-dice nan.* distances in pixels"):
        compare([row("1", 0.9)], other, ScoringOptions())
    assert compare([row("1", 0.9)], other, ScoringOptions("mm", 2.0, math.nan)).unit == "mm"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A dataset whose truth differs in image 3 from what is bright, and weights."""
    save_dataset(tmp_path / "data", errors={3: 2})
    save_model(brightness_model(), tmp_path / "w.safetensors", size=[24, 32])
    save_model(brightness_model(), tmp_path / "coarse.safetensors", size=[8, 8])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def evaluate(weights, *options, output="out"):
    main(["--weights", weights, "--data.root", "data", "--output", output, *options])


def test_the_command_compares_with_weights_and_with_the_folder_of_their_evaluation(place, capsys):
    evaluate("coarse.safetensors", output="coarse")
    capsys.readouterr()
    results = []
    for against in ("coarse.safetensors", "coarse", "coarse/per_image.csv"):
        evaluate("w.safetensors", "--against", against)
        results.append(json.loads((place / "out/comparison.json").read_text()))
        lines = capsys.readouterr().out.splitlines()
        assert lines[-1].startswith("test dice 0.974 (95% ")
        assert any(line.split()[:3] == ["changed", "most", "Dice,"] for line in lines)
        assert results[-1].pop("against") == against
    assert results[0] == results[1] == results[2]
    assert results[0]["classes"]["square"]["dice"]["better"] == 3
    with (place / "out/comparison.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [line["image"] for line in rows] == [f"images/{number}.png" for number in (3, 4, 5)]
    assert len(rows[0]) == 3 + 3 * len(METRICS)
    for line in rows:
        change = float(line["dice_this"]) - float(line["dice_other"])
        assert float(line["dice_difference"]) == pytest.approx(change, abs=2e-6)
    page = (place / "out/report.html").read_text()
    assert "This minus other (coarse/per_image.csv), on the same 3 images of 2 patients" in page
    assert "changed most" in page
    evaluate("w.safetensors")
    assert not list((place / "out").glob("comparison*"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--against", "nowhere"], "--against nowhere: there is no such file"),
        (["--against", "perfect", "--split", "all"], r"3 missing from perfect: images/0.png \(square\), "),
        (["--against", "perfect", "--tolerance", "3"], "--tolerance 2, .* --tolerance 3"),
        (["--against", "broken"], r"broken/per_image.csv: line 2 is not a row of scores"),
        (["--against", "old"], r"old/per_image.csv lacks the column patient, .* evaluate those weights again"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_computed(place, options, words):
    evaluate("w.safetensors", output="perfect")
    text = (place / "perfect/per_image.csv").read_text()
    for name, content in [("broken", text.replace("0.92", "x", 1)), ("old", "image,class,dice\n")]:
        (place / name).mkdir()
        (place / name / "per_image.csv").write_text(content)
    with pytest.raises(UserError, match=words):
        evaluate("w.safetensors", *options)
    assert not (place / "out").exists()
