"""Confidence without truth, and the images that a person should look at first."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pdrunet_jax.model.confidence import confidences
from pdrunet_jax.predict.__main__ import main
from pdrunet_jax.predict.resume import read_record
from pdrunet_jax.runtime.errors import UserError
from tests.support.tiny import bright_square, brightness_model, save_image, save_model


def test_confidence_is_the_dice_that_the_probabilities_lead_to_expect():
    probability = np.array([[0.9, 0.8, 0.2], [0.1, 0.0, 0.0]], np.float32)
    mask = np.array([[1, 1, 0], [0, 0, 0]], np.uint8)
    assert confidences(probability, mask) == pytest.approx((2 * 1.7 / (2.0 + 2),))
    assert confidences(mask.astype(np.float32), mask) == (1.0,)
    assert confidences(probability, 0 * mask) == pytest.approx((0.1,))  # the class may be there at 0.9

    # A pixel that moves away from the mask, inside or outside, lowers it.
    for place, value in (((0, 0), 0.7), ((1, 2), 0.3)):
        doubtful = probability.copy()
        doubtful[place] = value
        assert confidences(doubtful, mask) < confidences(probability, mask)


def test_each_class_has_its_own_confidence_with_and_without_overlap():
    first, second = np.array([[0.9, 0.1, 0.0]], np.float32), np.array([[0.0, 0.6, 0.1]], np.float32)
    exclusive = np.stack([1 - first - second, first, second], axis=-1)
    expected = confidences(first, first > 0.5) + confidences(second, second > 0.5)
    assert confidences(exclusive, exclusive.argmax(-1)) == expected
    layers = np.stack([first, second], axis=-1)
    assert confidences(layers, (layers > 0.5).astype(np.uint8)) == expected


def test_models_that_disagree_give_less_confidence_than_models_that_agree():
    one, other = (np.roll(np.pad(np.ones((8, 8), np.float32), 8), shift, axis=1) for shift in (0, 3))
    mean = (one + other) / 2
    assert confidences(mean, mean > 0.5) < confidences(one, one > 0.5) == (1.0,)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Folder `in`: a clear image, one whose bone is hardly brighter than the threshold, and one without bone."""
    for name, value in (("clear", 200), ("faint", 131), ("empty", 20)):
        save_image(tmp_path / f"in/{name}.png", bright_square(48, 64, 12, 20, 20, value))
    save_model(brightness_model(), tmp_path / "w.safetensors", class_names=["bone"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def predict(*options: str) -> None:
    main(["in", "--weights", "w.safetensors", "--output", "out", *options])


def contents() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path("out").iterdir()}


def rows(name: str) -> list[dict[str, str]]:
    with Path("out", name).open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_least_confident_images_are_listed_first(place, capsys):
    predict("--review", "2")
    said = capsys.readouterr().out
    assert [row["image"] for row in rows("review.csv")] == ["faint.png", "clear.png"]
    assert "look at these 2 of 3 images first" in said
    assert "nothing was found in 1 images: empty.png" in said
    by_image = {row["image"]: float(row["confidence"]) for row in rows("areas.csv")}
    assert by_image["faint.png"] < 0.8 < 0.99 < by_image["clear.png"] < by_image["empty.png"]
    assert float(rows("review.csv")[0]["confidence"]) == by_image["faint.png"]

    # Again, nothing changes; a person's notes are kept.
    before = contents()
    predict("--review", "2")
    assert contents() == before
    Path("out/review.csv").write_text("image,note\nfaint.png,seen\n")
    predict("--review", "2")
    assert contents() == {**before, "review_earlier1.csv": b"image,note\nfaint.png,seen\n"}
    with pytest.raises(UserError, match="--review 0: give at least 1"):
        predict("--review", "0")


def test_confidences_are_added_to_results_that_have_none_and_stay(place):
    predict("--labelme")
    plain = contents()
    assert read_record(Path("out/faint"))["confidence"] is None
    Path("out/clear.json").write_text("{}")  # corrected by a person
    Path("out/clear_overlay.png").write_bytes(plain["faint_overlay.png"])
    predict("--labelme", "--confidence")
    added = contents()
    assert b"area_mm2,confidence" in added["areas.csv"]
    assert added["clear.json"] == b"{}"
    assert added["clear_overlay.png"] == plain["faint_overlay.png"]  # not this command's any more: left alone
    assert added["faint_overlay.png"] != plain["faint_overlay.png"]
    np.testing.assert_array_equal(Image.open(place / "out/faint_mask.png"), bright_square(48, 64, 12, 20, 20) > 100)
    assert added.keys() == plain.keys()

    # A run that does not ask for them keeps them, also where it adds a file.
    predict("--labelme")
    assert contents() == added
    predict("--labelme", "--npz")
    assert contents()["areas.csv"] == added["areas.csv"]

    # Without the option, from the beginning, every file is what it was before there were confidences.
    main(["in", "--weights", "w.safetensors", "--output", "again", "--labelme"])
    assert {path.name: path.read_bytes() for path in Path("again").iterdir()} == plain
