"""Folds as one: averaged probabilities, out-of-fold scores, and what is refused."""

import csv
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from pdrunet_jax import load_model, segment
from pdrunet_jax.config import Config, DataConfig, ModelConfig, read, to_toml
from pdrunet_jax.data.dataset import open_dataset
from pdrunet_jax.evaluate.__main__ import main
from pdrunet_jax.evaluate.training_images import write_training_images
from pdrunet_jax.export.__main__ import main as export
from pdrunet_jax.model.ensemble import Ensemble, average_logits
from pdrunet_jax.model.load import load_any
from pdrunet_jax.model.pixels import probabilities
from pdrunet_jax.predict.__main__ import main as predict
from pdrunet_jax.runtime.errors import DataError, UserError
from pdrunet_jax.runtime.run_folder import RunFolder
from tests.support.tiny import brightness_model, save_dataset, save_image, save_model

SHIFTS = (-16.0, -10.0, -8.0)
"""Last bias of each fold's network: it marks pixels above -SHIFT / 32 of the brightest grey."""


@pytest.fixture
def folds(tmp_path: Path) -> Path:
    """A folder of three folds, each with a network of its own, on 9 images of 9 patients."""
    data = save_dataset(tmp_path / "data", count=9)
    with (data / "manifest.csv").open("w", newline="") as file:
        rows = [[f"images/{i}.png", f"masks/{i}.png", f"p{i}"] for i in range(9)]
        csv.writer(file).writerows([["image", "mask", "patient"], *rows])
    for number, shift in enumerate(SHIFTS, 1):
        settings = DataConfig(root=str(data), size=(24, 32), threads=1, fold=f"{number}/3")
        network = ModelConfig(filters=1, norm="none", dropout=0.0, outputs=1)
        run = RunFolder(tmp_path / "runs" / "cv" / f"fold_{number}")
        run.path.mkdir(parents=True)
        run.config_file.write_text(to_toml(Config(data=settings, model=network)))
        write_training_images(run, open_dataset(settings))
        model = brightness_model()
        model.final_conv.bias.set_value(jnp.array([shift]))
        save_model(model, run.best, size=[24, 32], class_names=["square"], threshold=0.2 * number)
    return tmp_path / "runs" / "cv"


def change(run: Path, **settings: object) -> None:
    """Replace settings of optimisation in a run's config.toml."""
    text = (run / "config.toml").read_text()
    for name, value in settings.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"{name} = ")]
        text = text.replace(line, f"{name} = {value}")
    (run / "config.toml").write_text(text)


def rows(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "per_image.csv").open(newline="") as file:
        return {row["image"]: row for row in csv.DictReader(file)}


@pytest.mark.parametrize(("outputs", "multilabel"), [(1, False), (3, False), (3, True)])
def test_averaged_logits_have_the_mean_of_the_probabilities(outputs: int, multilabel: bool) -> None:
    logits = np.random.default_rng(0).normal(0, 6, (4, 2, 5, 7, outputs)).astype(np.float32)
    logits[:, 0, 0, 0] = [[-9000.0] * outputs, [9000.0] * outputs, [80.0] * outputs, [-80.0] * outputs]
    by_hand = np.mean([probabilities(each.astype(np.float64), multilabel=multilabel) for each in logits], axis=0)
    averaged = average_logits([jnp.asarray(each) for each in logits], multilabel=multilabel)
    assert np.isfinite(averaged).all()
    np.testing.assert_allclose(probabilities(np.asarray(averaged), multilabel=multilabel), by_hand, atol=2e-6)
    logits[2, 1, 1, 1] = np.nan
    logits[3, 1, 1, 2] = np.inf
    broken = np.isnan(average_logits([jnp.asarray(each) for each in logits], multilabel=multilabel)).all(axis=-1)
    assert broken.sum() == 2  # never averaged away


def test_a_folder_of_folds_is_loaded_as_an_ensemble(folds: Path, tmp_path: Path) -> None:
    model = load_model(folds)
    assert isinstance(model, Ensemble)
    image = np.random.default_rng(1).integers(0, 256, (24, 32), dtype=np.uint8)
    unit = jnp.asarray(image[None, ..., None] / np.float32(255))
    by_hand = np.mean([1 / (1 + np.exp(-(32 * np.asarray(unit, np.float64) + shift))) for shift in SHIFTS], axis=0)
    np.testing.assert_allclose(probabilities(np.asarray(model(unit))), by_hand, atol=1e-5)
    np.testing.assert_allclose(segment(model, image).probability, by_hand[0, ..., 0], atol=1e-5)
    tiles = segment(model, image, tile=8, halo=8, augmentation="flips").probability
    np.testing.assert_allclose(tiles, by_hand[0, ..., 0], atol=1e-5)
    assert load_any(folds).options["threshold"] == pytest.approx(0.4)
    with pytest.raises(UserError, match="an ensemble predicts"):
        model(unit, train=True)
    # As a command, which goes on where it stopped, unless one of the members is another.
    path = save_image(tmp_path / "x.png", image)
    command = ["--weights", str(folds), str(path), "--output", str(tmp_path / "out"), "--npz"]
    assert predict(command) is None
    stored = np.load(tmp_path / "out" / "x_probability.npz")["probability"]
    np.testing.assert_allclose(stored, by_hand[0, ..., 0], atol=1e-5)
    assert predict(command) is None
    save_model(brightness_model(), folds / "fold_3" / "best.safetensors", size=[24, 32], class_names=["square"])
    with pytest.raises(UserError, match="other weights"):
        predict(command)


def test_every_image_is_scored_by_the_fold_that_tests_on_it(folds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--weights", str(folds), "--threshold", "validation"]  # each fold's own
    main(command)
    assert capsys.readouterr().out.splitlines()[-1].startswith("out-of-fold dice ")
    together, apart = rows(folds), {}
    for number in (1, 2, 3):
        main(["--weights", str(folds / f"fold_{number}"), "--threshold", "validation"])
        apart |= rows(folds / f"fold_{number}" / "evaluation" / "test")
    assert together == {name: apart[name] for name in together}
    assert len(together) == len(apart) == 9
    assert len({row["dice"] for row in together.values()}) > 1  # the networks do differ
    summary = json.loads((folds / "summary.json").read_text())
    assert summary["patients"] == 9
    assert [(each["fold"], each["images"]) for each in summary["about"]["folds"]] == [(1, 3), (2, 3), (3, 3)]
    mean = np.mean([each["dice"] for each in summary["about"]["folds"]])
    assert summary["macro"]["dice"]["mean"] == pytest.approx(mean)
    assert "Folds" in (folds / "report.html").read_text()
    main([*command, "--against", str(folds)])
    assert "0.000" in capsys.readouterr().out


def test_images_that_any_fold_has_seen_are_refused_but_out_of_fold(folds: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"was trained on 8 of the 9 images .* --split out-of-fold"):
        main(["--weights", str(folds), "--split", "all"])
    new = save_dataset(tmp_path / "new", count=6)
    for path in sorted((new / "images").glob("*.png")):
        save_image(path, np.asarray(255 - 20 * np.ones((24, 32))) - int(path.stem))
    main(["--weights", str(folds), "--data.root", str(new), "--split", "test", "--output", str(tmp_path / "scores")])
    assert len(rows(tmp_path / "scores")) == 3
    # The lists of training images of two folds change places: each has seen what it should test.
    first, second = (folds / f"fold_{number}" / "training_images.txt" for number in (1, 2))
    text = first.read_text()
    first.write_text(second.read_text())
    second.write_text(text)
    with pytest.raises(DataError, match=r"fold_1 was trained on \d of the 3 images that it should test"):
        main(["--weights", str(folds)])
    first.unlink()
    with pytest.raises(DataError, match=r"fold_1/training_images\.txt is missing"):
        main(["--weights", str(folds)])


def test_what_is_not_all_folds_of_one_training_is_refused_by_name(folds: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds 3 folds, and this takes one network: name a fold, as in .*fold_1"):
        export(["--weights", str(folds), "--format", "stablehlo", "--output", str(tmp_path / "x")])
    with pytest.raises(UserError, match="out-of-fold scores a folder of folds"):
        main(["--weights", str(folds / "fold_1"), "--split", "out-of-fold"])
    (folds / "fold_2").rename(folds / "aside")
    with pytest.raises(UserError, match=r"has 2 of 3 folds; missing: 2\. Go on"):
        load_model(folds)
    (folds / "aside").rename(folds / "fold_2")
    change(folds / "fold_2", learning_rate=0.5, steps=7)
    with pytest.raises(DataError) as refused:
        load_model(folds)
    assert [problem.split(": ", 1)[0] for problem in refused.value.problems] == [str(folds / "fold_2")] * 2
    assert {problem.split(": ")[1] for problem in refused.value.problems} == {"optim.learning_rate", "train.steps"}
    change(folds / "fold_2", learning_rate=0.001, steps=read(folds / "fold_1" / "config.toml").train.steps)
    change(folds / "fold_2", fold='"2/5"')
    with pytest.raises(DataError, match=r"fold_2: data\.fold is 2/5, not 2/3"):
        load_model(folds)
    change(folds / "fold_2", fold='"2/3"')
    save_model(brightness_model(), folds / "fold_2" / "best.safetensors", size=[24, 32], class_names=["bone"])
    with pytest.raises(UserError, match=r"fold_2: other classes or another network than in .*fold_1"):
        load_model(folds)
