"""The threshold that validation images choose: found, kept with the weights, and taken by every command."""

import json

import numpy as np
import pytest
from PIL import Image

from pdrunet_jax.config import DataConfig
from pdrunet_jax.data.dataset import open_dataset
from pdrunet_jax.evaluate.__main__ import main as evaluate
from pdrunet_jax.export.__main__ import ExportOptions, export
from pdrunet_jax.model.files import read_weights, write_safetensors
from pdrunet_jax.model.load import load_model, load_weights
from pdrunet_jax.predict.threshold import THRESHOLD_KEY, resolve_threshold, store_threshold
from pdrunet_jax.runtime.digest import CONTENT, content_digest
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.files import atomic_write
from pdrunet_jax.runtime.stop import StopFlag
from pdrunet_jax.train.final import Choice, choose_threshold
from tests.support.tiny import brightness_model, save_image, save_model

DIM = 126
"""A grey value to which `brightness_model` gives the probability 0.45."""


def dim_dataset(root):
    """Squares that are true although their probability is below 0.5, on a darker ground."""
    rows = ["image,mask,patient,split"]
    for number, split in enumerate(("train", "val", "val", "test")):
        image = np.full((16, 16), 20, np.uint8)
        image[4:12, 4 + number : 12] = DIM
        image[0, number] = 90
        save_image(root / f"images/{number}.png", image)
        save_image(root / f"masks/{number}.png", np.where(image == DIM, 255, 0))
        rows.append(f"images/{number}.png,masks/{number}.png,p{number},{split}")
    (root / "manifest.csv").write_text("\n".join(rows) + "\n")
    (root / "dataset.toml").write_text("[classes]\nsquare = 255\n")
    return root


def sealed(path, **options):
    """Weights with their digest, as training writes them."""
    file = read_weights(save_model(brightness_model(), path, **options))
    write_safetensors(path, file.arrays, {**file.options, CONTENT: content_digest(file.arrays, file.options)})
    return path


def test_the_threshold_with_the_best_mean_dice_of_the_validation_images_is_chosen(tmp_path):
    config = DataConfig(root=str(dim_dataset(tmp_path)), size=(16, 16), threads=1)
    dataset = open_dataset(config)
    choice = choose_threshold(brightness_model(), dataset, config)
    assert choice == Choice(threshold=0.45, dice=1.0, dice_at_half=0.0)
    stop = StopFlag()
    stop.request()
    assert choose_threshold(brightness_model(), dataset, config, stop=stop) is None


def test_it_is_kept_with_the_weights_under_a_digest_that_holds(tmp_path):
    path = sealed(tmp_path / "best.safetensors", size=[16, 16], val_dice=0.5)
    before, arrays = load_weights(path).options, read_weights(path).arrays
    assert store_threshold(path, 0.45)
    assert load_weights(path).options == {**before, THRESHOLD_KEY: 0.45}  # reading checks the digest
    assert all(np.array_equal(arrays[name], array) for name, array in read_weights(path).arrays.items())
    first = path.read_bytes(), path.stat().st_mtime_ns
    assert store_threshold(path, 0.45)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == first
    assert [item.name for item in tmp_path.iterdir()] == ["best.safetensors"]


def test_damage_is_not_hidden_by_a_new_digest(tmp_path):
    path = sealed(tmp_path / "best.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    atomic_write(path, bytes(data))
    assert not store_threshold(path, 0.45)
    assert path.read_bytes() == bytes(data)
    assert not store_threshold(tmp_path / "none.safetensors", 0.45)
    with pytest.raises(UserError, match="damaged"):
        load_model(path)


def test_validation_means_the_same_in_every_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = dim_dataset(tmp_path / "data")
    path = sealed(tmp_path / "w.safetensors", size=[16, 16], threshold=0.4)
    from pdrunet_jax.predict.__main__ import main as predict

    for given, dice, inside in ((("--threshold", "validation"), 1.0, 0.4), ((), 0.0, 0.5)):
        evaluate(["--weights", str(path), "--data.root", str(root), "--output", "scores", *given])
        summary = json.loads((tmp_path / "scores/summary.json").read_text())
        assert (summary["about"]["threshold"], summary["macro"]["dice"]["mean"]) == (inside, dice)
        predict([str(root / "images/3.png"), "--weights", str(path), "--output", "masks", "--overwrite", *given])
        assert np.asarray(Image.open(tmp_path / "masks/3_mask.png")).max() == dice
    none = sealed(tmp_path / "none.safetensors", size=[16, 16])
    with pytest.raises(UserError, match="contains no threshold"):
        export(ExportOptions(str(none), "stablehlo", tmp_path / "x.stablehlo", threshold="validation"))


@pytest.mark.parametrize(
    ("given", "known", "words"),
    [
        ("validation", {"outputs": 1}, r"w contains no threshold\. Training stores one"),
        ("validation", {"outputs": 1, THRESHOLD_KEY: 1.5}, "contains no threshold"),
        ("validation", {"outputs": 1, THRESHOLD_KEY: True}, "contains no threshold"),
        (
            "validation",
            {"outputs": 3, THRESHOLD_KEY: 0.4},
            "3 outputs and takes the most probable class; leave the option out",
        ),
        (0.3, {"outputs": 3}, "3 outputs"),
        (-0.1, {"outputs": 1}, "between 0 and 1"),
        ("femur=0.4", {"outputs": 3, "class_names": ["femur", "tibia"]}, "the most probable class"),
        ("half", {"outputs": 1, "class_names": ["bone"]}, "one for each class: bone=0.5"),
        ("femur=0.4", {"outputs": 2, "multilabel": True, "class_names": ["femur", "tibia"]}, "femur=0.5,tibia=0.5"),
        ("femur=2,tibia=0.5", {"outputs": 2, "multilabel": True, "class_names": ["femur", "tibia"]}, "between 0 and 1"),
    ],
)
def test_what_cannot_be_is_refused_in_words(given, known, words):
    with pytest.raises(UserError, match=words):
        resolve_threshold(given, known, "w")


def test_a_threshold_for_each_class_is_given_by_name():
    known = {"outputs": 2, "multilabel": True, "class_names": ["femur", "tibia"]}
    assert resolve_threshold("tibia=0.6,femur=0.4", known, "w") == (0.4, 0.6)
    assert resolve_threshold("bone=0.4", {"outputs": 1, "class_names": ["bone"]}, "w") == 0.4
