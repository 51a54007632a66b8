"""Masks made elsewhere get the scores that a model with these masks would get."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pdrunet_jax.config import DataConfig
from pdrunet_jax.data.dataset import open_dataset
from pdrunet_jax.evaluate.__main__ import main
from pdrunet_jax.evaluate.evaluation import EvaluationOptions, evaluate_split
from pdrunet_jax.evaluate.predictions import evaluate_predictions
from pdrunet_jax.predict.outputs import mask_png
from pdrunet_jax.runtime.errors import DataError, UserError
from tests.support.small_data import noise, save, shapes
from tests.support.tiny import brightness_model, save_dataset


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three images with masks of femur (2) and tibia (1)."""
    for index in range(3):
        save(noise(index), tmp_path / f"data/images/p/x{index}.png")
        save(np.array([0, 2, 1], np.uint8)[shapes(index)], tmp_path / f"data/masks/p/x{index}.png")
    (tmp_path / "data/dataset.toml").write_text("classes = { femur = 2, tibia = 1 }\nspacing = 0.5\n")
    return tmp_path / "data"


def scored(data: Path, folder: Path, split: str = "all", **classes: Any) -> tuple[Any, list[str]]:
    dataset = open_dataset(DataConfig(root=str(data), threads=1))
    return evaluate_predictions(folder, dataset, split, EvaluationOptions(), classes)


def refused(data: Path, folder: Path, split: str = "all", **classes: Any) -> str:
    with pytest.raises(UserError) as caught:
        scored(data, folder, split, **classes)
    return str(caught.value)


def test_scores_equal_those_of_the_model_that_made_the_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = save_dataset(tmp_path, errors={3: 2})
    config = DataConfig(root=str(root), size=(24, 32), threads=1)
    model = evaluate_split(brightness_model(), open_dataset(config), "test", config)
    for sample in open_dataset(config).samples:
        mask = np.asarray(Image.open(sample.image).convert("L")) > 127
        save(mask.astype(np.uint8) * 255, tmp_path / "predicted" / f"{sample.image.stem}_mask.png")
    monkeypatch.chdir(tmp_path)
    arguments = ["--predictions", "predicted", "--data.root", str(root), "--output", "scores"]
    main(arguments)
    shown = capsys.readouterr().out
    assert "test dice 0.974" in shown
    assert scored(root, tmp_path / "predicted", "test")[0].rows == model.rows
    summary = json.loads((tmp_path / "scores/summary.json").read_text())
    assert summary["about"]["predictions"] == "predicted"
    assert "without probabilities" in (tmp_path / "scores/report.html").read_text()
    assert (tmp_path / "scores/worst.png").is_file()
    main([*arguments[:-1], "again", "--against", "scores"])
    assert "0.000" in capsys.readouterr().out
    for wrong, reason in (
        ([], "give --weights"),
        (["--weights", "x", *arguments], "give either --weights"),
        (["--predictions", "none", *arguments[2:]], "is not a folder"),
    ):
        with pytest.raises(UserError, match=reason):
            main(wrong)


def test_values_mean_what_is_declared_recorded_or_usual_in_the_dataset(data: Path, tmp_path: Path) -> None:
    def written(name: str, table: list[int], file: str = "p/x{}.png") -> Path:
        for index in range(3):
            save(np.array(table, np.uint8)[shapes(index)], tmp_path / name / file.format(index))
        return tmp_path / name

    for folder, classes in (
        (written("own", [0, 2, 1]), {}),
        (written("names", [0, 2, 1], "x{}_pred.png"), {}),
        (written("other", [0, 50, 99]), {"femur": 50, "tibia": 99}),
    ):
        evaluation, _ = scored(data, folder, **classes)
        assert {row.dice for row in evaluation.rows} == {1.0}
        assert evaluation.summary.unit == "mm"
    for index in range(3):  # of the predict command, with the classes in another order
        record = {"settings": {}, "input": "", "files": {}, "pixels": {"tibia": 1, "femur": 1}}
        swapped = np.array([0, 2, 1], np.uint8)[shapes(index)]
        path = tmp_path / f"predicted/x{index}_mask.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(mask_png(swapped, 2, record))
        save(noise(1), tmp_path / f"predicted/x{index}_overlay.png")
    assert {row.dice for row in scored(data, tmp_path / "predicted")[0].rows} == {1.0}
    path.write_bytes(mask_png(swapped, 2, {**record, "pixels": {"ulna": 1, "femur": 1}}))
    assert "predicted with the classes ulna, femur; the dataset has femur, tibia" in refused(
        data, tmp_path / "predicted"
    )
    message = refused(data, tmp_path / "other")
    assert "undeclared mask values 50, 99" in message
    assert "the dataset's masks have femur = 2; tibia = 1" in message
    assert "--prediction-classes declares bone" in refused(data, tmp_path / "other", bone=50)


def test_missing_and_extra_predictions_and_other_sizes_are_named(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "predicted"
    save(shapes(0), folder / "x0.png")
    save(shapes(0), folder / "x0_mask.png")
    save(shapes(0), folder / "p/x1.png")
    save(shapes(0), folder / "y.png")
    message = refused(data, folder)
    assert re.search(r"images/p/x0.png: several predictions: \S+x0.png, \S+x0_mask.png", message)
    assert "images/p/x2.png: no prediction named x2.*" in message
    assert "predictions without an image: y.png" in message
    (folder / "x0_mask.png").unlink()
    save(shapes(0)[:-1], folder / "x2.png")
    with pytest.raises(DataError, match=r"x2.png: 24x19 pixels, but the mask of images/p/x2.png has 24x20"):
        scored(data, folder)
    save(shapes(0), folder / "x2.png")
    assert "1 predictions have no image in the dataset: y.png" in scored(data, folder)[1]
