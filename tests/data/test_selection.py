"""The images to annotate next: the network is unsure of them; they differ from each other and the training images."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from pdrunet_jax.data.selection import Next, choose, choose_next
from pdrunet_jax.runtime.errors import DataError, RunError, UserError
from tests.support.tiny import bright_square, brightness_model, save_dataset, save_image, save_model


def test_chosen_images_are_unsure_unlike_the_training_images_and_unlike_each_other():
    confidence = np.array([0.5, 0.5, 0.6, 0.6, 0.9, 0.9])
    features = np.array([[5.0, 0.0], [5.1, 0.0], [0.0, 3.0], [0.1, 0.1], [9.0, 9.0], [-9.0, 9.0]])
    trained = np.zeros((3, 2))
    # The last two are the most unlike, and sure: no candidates. Of two that are alike, one is enough.
    assert choose(confidence, features, trained, 2) == [1, 2]
    assert choose(confidence, features, None, 2)[0] == 0  # nothing to compare with: the least confident first
    assert sorted(choose(confidence, features, trained, 9)) == [0, 1, 2, 3, 4, 5]
    assert choose(confidence, np.ones((6, 2)), trained + 1, 2) == [0, 1]  # all alike


def test_a_feature_counts_the_same_whatever_its_scale():
    rng = np.random.default_rng(0)
    features, trained = rng.random((12, 4)), rng.random((5, 4))
    scale = np.array([1.0, 1e3, 1e-3, 7.0])
    assert choose(rng.random(12), features, trained, 4) != list(range(4))
    confidence = rng.random(12)
    assert choose(confidence, features * scale, trained * scale, 4) == choose(confidence, features, trained, 4)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A dataset `done`, weights, and a `pool` with one image of the dataset, three new ones, and a predicted mask."""
    save_dataset(tmp_path / "done")
    save_model(brightness_model(), tmp_path / "w.safetensors", class_names=["square"], size=[32, 32])
    for name, value in (("clear", 250), ("faint", 132), ("fainter", 130), ("clear_mask", 255)):
        save_image(tmp_path / f"pool/{name}.png", bright_square(32, 32, 4, 5, 20, value))
    shutil.copy(tmp_path / "done/images/2.png", tmp_path / "pool/again.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_ranks_new_images_and_writes_a_list_for_predict(place, capsys):
    options = Next("w.safetensors", Path("pool"), count=2, annotated=Path("done"), output=Path("next.txt"))
    choose_next(options)
    said = capsys.readouterr().out
    assert set(Path("next.txt").read_text().split()) <= {"pool/clear.png", "pool/faint.png", "pool/fainter.png"}
    assert "training images: 2 of 6 annotated images in done" in said
    assert "left out: 1 images that are annotated already" in said
    assert "by their names (1): pool/clear_mask.png" in said
    with pytest.raises(UserError, match=r"next.txt exists; .* --overwrite"):
        choose_next(options)

    # Without the training images, which weights alone do not name, the least confident comes first.
    save_image(Path("pool/dark.png"), bright_square(32, 32, 4, 5, 20, 40))
    choose_next(Next("w.safetensors", Path("pool"), count=1))
    said = capsys.readouterr().out
    assert "training images: unknown (w.safetensors does not name them); give --annotated FOLDER" in said
    assert "pool/fainter.png" in said.splitlines()[-2]
    assert said.splitlines()[-1] == "nothing was found in 1 images; look at them too: pool/dark.png"


def test_what_cannot_be_used_is_named_and_the_others_are_ranked(place, capsys):
    Path("pool/broken.png").write_bytes(b"no image")
    with pytest.raises(RunError, match=r"(?s)1 images of the pool could not be used.*pool/broken.png"):
        choose_next(Next("w.safetensors", Path("pool"), count=9, annotated=Path("done")))
    said = capsys.readouterr().out
    assert all(f"pool/{name}.png" in said for name in ("clear", "faint", "fainter"))
    assert "the pool has no more than these 3" in said
    with pytest.raises(DataError, match="holds no image that could be annotated next"):
        choose_next(Next("w.safetensors", Path("done/images"), annotated=Path("done")))
    with pytest.raises(UserError, match="--count 0"):
        choose_next(Next("w.safetensors", Path("pool"), count=0))
    Path("none").mkdir()
    with pytest.raises(DataError, match="--pool none: contains no image"):
        choose_next(Next("w.safetensors", Path("none")))
    with pytest.raises(UserError, match="--pool nowhere: no such folder"):
        choose_next(Next("w.safetensors", Path("nowhere")))
