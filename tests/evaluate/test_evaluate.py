import csv
import json
import math
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pdrunet_jax.config import Config, DataConfig, ModelConfig
from pdrunet_jax.data.dataset import open_dataset
from pdrunet_jax.evaluate import evaluation, scores
from pdrunet_jax.evaluate.__main__ import main
from pdrunet_jax.evaluate.evaluation import EvaluationOptions, evaluate_split, write_evaluation
from pdrunet_jax.evaluate.scores import CSV_COLUMNS, METRICS, read_csv
from pdrunet_jax.evaluate.training_images import write_training_images
from pdrunet_jax.predict.postprocess import Cleaning
from pdrunet_jax.runtime import cli
from pdrunet_jax.runtime.errors import RunError, UserError
from pdrunet_jax.runtime.processes import Group
from pdrunet_jax.runtime.run_folder import RunFolder
from pdrunet_jax.train.run import open_run
from tests.support.tiny import (
    bright_square,
    brightness_model,
    overflowing_model,
    run_command,
    save_dataset,
    save_image,
    save_model,
)

LINE = re.compile(
    r"(train|val|test|all) dice \d\.\d{3} \(95% (\d\.\d{3}-\d\.\d{3}|nan-nan), \d+ images, \d+ patients\)"
)


def opened(root, size=(24, 32)):
    config = DataConfig(root=str(root), size=size, threads=1)
    return open_dataset(config), config


def evaluated(root, split="test", **options):
    dataset, config = opened(root)
    return evaluate_split(brightness_model(), dataset, split, config, EvaluationOptions(**options))


def test_a_perfect_model_scores_one(tmp_path):
    evaluation = evaluated(save_dataset(tmp_path))
    assert [(row.dice, row.iou, row.precision, row.recall) for row in evaluation.rows] == [(1, 1, 1, 1)] * 3
    assert [(row.pixels_true, row.pixels_predicted) for row in evaluation.rows] == [(144, 144)] * 3
    assert scores.dice_line("test", evaluation.summary) == "test dice 1.000 (95% 1.000-1.000, 3 images, 2 patients)"


def test_logits_that_are_not_finite_are_an_error_not_a_low_score(tmp_path):
    dataset, config = opened(save_dataset(tmp_path))
    with pytest.raises(RunError, match=r"3\.png: the network computes NaN"):
        evaluate_split(overflowing_model(), dataset, "test", config)


def test_scores_of_a_known_error_are_those_on_paper(tmp_path):
    """In image 3 the truth is 2 columns (of 12) wider than the bright square."""
    evaluation = evaluated(save_dataset(tmp_path, errors={3: 2}))
    worst = evaluation.rows[0]
    assert worst.dice == pytest.approx(2 * 144 / (2 * 144 + 24))
    assert worst.recall == pytest.approx(144 / 168)
    assert worst.precision == 1
    assert evaluation.summary.macro["dice"].mean == pytest.approx((worst.dice + 2) / 3)


def test_ignored_pixels_cost_nothing(tmp_path):
    assert evaluated(save_dataset(tmp_path, errors={3: 2}, ignore=True)).rows[0].dice == 1


def test_distances_of_a_known_error_are_those_on_paper(tmp_path):
    """12x12 predicted, 12x14 true: the right edges are 2 apart, the rest of the boundary is shared."""
    worst = evaluated(save_dataset(tmp_path, errors={3: 2}), tolerance=1).rows[0]
    boundaries = 44 + 48
    assert worst.hd95 == 2
    edge = sum(min(2, row, 11 - row) for row in range(1, 11))  # right edge of the square, to the nearest of three edges
    assert worst.assd == pytest.approx((2 * (1 + 2) + 10 * 2 + edge) / boundaries)
    assert worst.nsd == pytest.approx((boundaries - 12 - 8) / boundaries)
    assert worst.specificity == 1
    assert worst.area_error == pytest.approx(-24 / 168)


def test_distances_are_in_mm_where_every_image_has_a_spacing(tmp_path):
    root = save_dataset(tmp_path, errors={3: 2})
    pixels = evaluated(root)
    with (root / "dataset.toml").open("r+") as file:
        text = file.read()
        file.seek(0)
        file.write(f"spacing = [0.5, 0.25]\n{text}")
    mm = evaluated(root)
    assert (pixels.summary.unit, mm.summary.unit) == ("pixels", "mm")
    assert mm.rows[0].hd95 == 0.25 * pixels.rows[0].hd95 == 0.5
    assert "images/3.png" in pixels.unit_note
    assert "hd95 (mm)" in mm.text()
    assert "nsd (within 2 pixels)" in pixels.text()


def test_empty_masks_are_scored_as_asked_and_counted(tmp_path):
    root = save_dataset(tmp_path)
    empty = np.zeros((24, 32))
    for number in (3, 4):
        save_image(root / f"masks/{number}.png", empty)
    image = empty + 20
    image[0, 0] = 30
    save_image(root / "images/3.png", image)
    usual, strict = evaluated(root), evaluated(root, empty_dice=math.nan)
    both, missed, right = usual.rows
    assert (both.dice, missed.dice, missed.nsd, right.nsd) == (1, 0, 0, 1)
    assert all(math.isnan(value) for value in (both.hd95, both.assd, both.nsd, both.area_error, missed.hd95))
    assert math.isnan(strict.rows[0].dice)
    assert usual.summary.empty == usual.summary.one_empty == {"square": 1}
    dice = [evaluation.summary.classes["square"]["dice"].images for evaluation in (usual, strict)]
    assert dice == [3, 2]
    assert usual.text().splitlines()[-3:-1] == [
        "square: in 1 of 3 images truth and prediction are both empty: Dice 1, excluded from distances",
        "square: in 1 of 3 images only one of truth and prediction is empty: Dice and nsd 0, excluded from other "
        "distances",
    ]
    assert "excluded from Dice, IoU and distances" in strict.text().splitlines()[-3]


def test_the_batch_size_has_no_part_in_the_result(tmp_path):
    root = save_dataset(tmp_path, errors={4: 3})
    assert evaluated(root, batch_size=1).rows == evaluated(root, batch_size=2).rows


def test_scores_are_at_the_inputs_resolution(tmp_path):
    dataset, config = opened(save_dataset(tmp_path), size=(12, 16))
    rows = evaluate_split(brightness_model(), dataset, "test", config).rows
    assert [row.pixels_true for row in rows] == [144] * 3
    assert all(0.8 < row.dice <= 1 for row in rows)


class Together(Group):
    """One of several processes, played by threads of this one."""

    def gather(self, value):
        self.given[self.index] = value
        self.barrier.wait()
        values = [self.given[index] for index in range(self.count)]
        self.barrier.wait()
        return values


def test_several_processes_find_what_one_finds_and_exchange_the_masks_of_shown_cases_alone(tmp_path, monkeypatch):
    root = save_dataset(tmp_path, errors={1: 1, 2: 2, 3: 3, 4: 4, 5: 5})
    monkeypatch.setattr(evaluation, "WORST", 1)
    monkeypatch.setattr(evaluation, "CASES", (("best", 1), ("worst", 2)))
    dataset, config = opened(root)
    monkeypatch.setattr(Together, "given", {}, raising=False)
    monkeypatch.setattr(Together, "barrier", threading.Barrier(2, timeout=60), raising=False)

    def evaluate(group):
        options = EvaluationOptions(batch_size=1)
        return evaluate_split(brightness_model(), dataset, "all", config, options, group=group)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(evaluate, [Together(0, 2), Together(1, 2)])
    alone = evaluate(None)
    assert first.masks == second.masks == alone.masks
    assert set(alone.masks) == {case.sample.id for case in alone.cases()} == {f"images/{n}.png" for n in (0, 4, 5)}
    assert first.rows == second.rows == alone.rows
    assert first.curves == second.curves
    assert first.curves["square"].dice == pytest.approx(alone.curves["square"].dice, rel=1e-15)


def test_all_takes_every_split(tmp_path):
    evaluation = evaluated(save_dataset(tmp_path), "all")
    assert [row.image for row in evaluation.rows] == [f"images/{number}.png" for number in range(6)]


def test_an_empty_split_names_those_that_are_not(tmp_path):
    root = save_dataset(tmp_path)
    text = (root / "manifest.csv").read_text()
    (root / "manifest.csv").write_text("".join(line for line in text.splitlines(True) if ",test" not in line))
    with pytest.raises(UserError, match=r"no images in the split test; use --split train, val or all"):
        evaluated(root)


def test_a_model_of_other_classes_is_refused(tmp_path):
    dataset, config = opened(save_dataset(tmp_path))
    with pytest.raises(UserError, match=r"2 foreground classes, but .* has 1 "):
        evaluate_split(brightness_model(3), dataset, "test", config)


def test_the_folder_holds_table_summary_and_pictures(tmp_path):
    evaluation = evaluated(save_dataset(tmp_path / "data", errors={4: 4}))
    folder = tmp_path / "out"
    write_evaluation(evaluation, folder, {"weights": "w"})
    with (folder / "per_image.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = ["image", "patient", "class", *METRICS, "pixels_true", "pixels_predicted"]
    assert list(rows[0]) == list(CSV_COLUMNS) == expected
    assert [float(row["dice"]) for row in rows] == pytest.approx([row.dice for row in evaluation.rows], abs=1e-6)
    assert {row["class"] for row in rows} == {"square"}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["macro"]["dice"]["mean"] == pytest.approx(np.mean([row.dice for row in evaluation.rows]))
    assert summary["dataset"]["splits"]["train"] == {"images": 2, "patients": 2}
    assert summary["line"] == scores.dice_line("test", evaluation.summary)
    assert (summary["unit"], summary["tolerance"], summary["empty_dice"]) == ("pixels", 2, 1)
    assert read_csv(folder / "per_image.csv")[1].hd95 == evaluation.rows[1].hd95 > 0
    assert [case["kind"] for case in summary["cases"]] == ["best", "best", "worst"]
    assert summary["cases"][-1]["image"] == "images/4.png"
    assert all((folder / panel).is_file() for case in summary["cases"] for panel in case["panels"])
    with Image.open(folder / "worst.png") as sheet:
        assert sheet.width > 4 * 256
    assert not list(folder.rglob("*.tmp"))


def test_the_command_scores_a_run_with_its_own_settings(tmp_path):
    root = save_dataset(tmp_path / "data", errors={3: 2})
    data, model = DataConfig(root=str(root), size=(24, 32), threads=1), ModelConfig(filters=1, norm="none")
    run = open_run(tmp_path / "run", Config(data=data, model=model))
    save_model(brightness_model(), run.best, size=[24, 32], class_names=["square"])
    done = run_command("evaluate", "--weights", run.path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert LINE.fullmatch(lines[-1])
    assert lines[-1].startswith("test dice 0.974")
    assert any(line.split()[:3] == ["square", "dice", "0.974"] for line in lines)
    assert (run.path / "evaluation" / "test" / "summary.json").is_file()


def test_evaluations_of_different_weights_and_data_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("data", "more"):
        save_dataset(tmp_path / name)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_model(brightness_model(), tmp_path / name / "w.safetensors", size=[24, 32])
    for weights, data in (("a", "data"), ("b", "data"), ("b", "more")):
        main(["--weights", f"{weights}/w.safetensors", "--data.root", data])
    assert sorted(path.name for path in (tmp_path / "evaluation").iterdir()) == ["a_w_data", "b_w_data", "b_w_more"]
    assert (tmp_path / "evaluation/b_w_more/test/summary.json").is_file()


def test_the_command_takes_other_data_and_split_and_output(tmp_path):
    root = save_dataset(tmp_path / "data")
    weights = save_model(brightness_model(), tmp_path / "w.safetensors", size=[24, 32])
    done = run_command(
        "evaluate",
        *("--weights", weights, "--data.root", root, "--split", "all", "--output", "out", "--batch-size", "2"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "all dice 1.000 (95% 1.000-1.000, 6 images, 5 patients)"
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["about"].pop("seconds") > 0
    assert summary["about"] == {
        "resolution": "input",
        "weights": str(weights),
        "data": str(root),
        "size": [24, 32],
        "fit": "stretch",
        "spacing": None,
        "engine": "jax",
        "precision": "float32",
        "threshold": 0.5,
        "threshold_from": "option",
        "cleaning": {"largest": 0, "min_area": 0, "fill_holes": False},
    }
    assert summary["environment"]["jax"]
    assert "squares, all images" in (tmp_path / "out" / "report.html").read_text()


def scored(arguments):
    """Run the command in this process with an output folder of its own; returns its summary."""
    folder = Path(arguments[arguments.index("--output") + 1])
    main([str(argument) for argument in arguments])
    return json.loads((folder / "summary.json").read_text())


def test_images_that_a_run_was_trained_on_are_refused_whatever_their_name_and_split(tmp_path):
    root = save_dataset(tmp_path / "data")
    data, model = DataConfig(root=str(root), size=(24, 32), threads=1), ModelConfig(filters=1, norm="none")
    run = open_run(tmp_path / "run", Config(data=data, model=model))
    save_model(brightness_model(), run.best, size=[24, 32], class_names=["square"])
    write_training_images(run, open_dataset(data))
    other = tmp_path / "other"
    shutil.copytree(root, other)
    (other / "images/1.png").rename(other / "images/renamed.png")
    rows = ["renamed.png,masks/1.png,p1,test", "0.png,masks/0.png,p2,train", "3.png,masks/3.png,p3,test"]
    (other / "manifest.csv").write_text("\n".join(["image,mask,patient,split", *(f"images/{row}" for row in rows)]))
    command = ["--weights", run.path, "--data.root", other, "--output", tmp_path / "out"]
    with pytest.raises(UserError, match=r"trained on 1 of the 2 images of .*: images/renamed.png\."):
        scored(command)
    assert scored([*command, "--allow-training-images"])["images"] == 2
    assert scored([*command, "--split", "train"])["images"] == 1
    own = ["--weights", run.best, "--output", tmp_path / "own"]
    assert scored(own)["images"] == 3
    with pytest.raises(UserError, match="trained on 2 of the 6 images"):
        scored([*own, "--split", "all"])
    later = RunFolder(tmp_path)
    write_training_images(later, open_dataset(DataConfig(root=str(other), threads=1)), earlier=str(run.path))
    assert len(later.training_images.read_text().splitlines()) == 1 + 3


def test_other_data_is_scored_in_its_own_classes_matched_by_name(tmp_path):
    for name, femur in (("a", 1), ("b", 2)):
        for number in range(3):
            pixels = bright_square(24, 32, 4 + number, 6, 9, value=120)
            pixels[15:22, 20:30] = 250
            truth = np.where(pixels == 120, femur, np.where(pixels == 250, 3 - femur, 0))
            save_image(tmp_path / name / f"test/images/{number}.png", pixels)
            save_image(tmp_path / name / f"test/masks/{number}.png", truth)
    data = DataConfig(root=str(tmp_path / "a"), size=(24, 32), threads=1, classes={"femur": 1, "tibia": 2})
    run = open_run(tmp_path / "run", Config(data=data, model=ModelConfig(filters=1, norm="none")))
    save_model(brightness_model(outputs=3), run.best, size=[24, 32], class_names=["femur", "tibia"])
    description, command = tmp_path / "b" / "dataset.toml", ["--weights", run.path, "--output", tmp_path / "out"]
    description.write_text("classes = { tibia = 1, femur = 2 }")
    for arguments in (
        [],
        ["--data.root", tmp_path / "b"],
        ["--data.root", tmp_path / "b", "--data.classes", "femur", 2, "tibia", 1],
    ):
        summary = scored([*command, *arguments])
        assert {name: each["dice"]["mean"] for name, each in summary["classes"].items()} == {"femur": 1, "tibia": 1}
    description.write_text("classes = { tibia = 1, patella = 2 }")
    words = r"has femur, tibia \(declared are femur = 1, tibia = 2\); .* \(declared are tibia = 1, patella = 2\)"
    with pytest.raises(UserError, match=words):
        scored([*command, "--data.root", tmp_path / "b"])


def test_masks_are_cleaned_before_they_are_scored_when_asked_to(tmp_path):
    """The specks that `save_dataset` leaves above each square are made bright here: one false pixel an image."""
    root = save_dataset(tmp_path / "data")
    for path in (root / "images").iterdir():
        pixels = np.asarray(Image.open(path)).copy()
        pixels[0, int(path.stem)] = 200 + int(path.stem)
        Image.fromarray(pixels).save(path)
    as_it_is = evaluated(root)
    assert [row.dice for row in as_it_is.rows] == pytest.approx([288 / 289] * 3)
    assert {row.dice for row in evaluated(root, cleaning=Cleaning(largest=1)).rows} == {1.0}
    weights = save_model(brightness_model(), tmp_path / "w.safetensors", size=[24, 32])
    main(["--weights", str(weights), "--data.root", str(root), "--output", str(tmp_path / "out"), "--min-area", "2"])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["macro"]["dice"]["mean"] == 1
    assert summary["about"]["cleaning"] == {"largest": 0, "min_area": 2, "fill_holes": False}
    assert "Masks were cleaned: min_area = 2" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--weights", "nowhere"], "nowhere: there is no such file"),
        (["--data.root", "x"], "weights"),
        (["--weights", "w.safetensors", "--data.root", "nowhere"], "nowhere"),
        (["--weights", "w.safetensors", "--batch-size", "0"], "--batch-size 0"),
        (["--weights", "w.safetensors", "--data.threshold", "0"], "threshold"),
        (["--weights", "w.safetensors", "--threshold", "1.5"], "1.5"),
        (["--weights", "w.safetensors", "--threshold", "validation"], "w.safetensors contains no threshold"),
        (["--weights", "w.safetensors", "--largest", "-1"], "--largest -1"),
        (["--weights", "w.safetensors", "--tolerance", "-1"], "--tolerance -1"),
        (["--weights", "w.safetensors", "--empty-dice", "2"], "--empty-dice 2"),
    ],
)
def test_bad_options_are_one_message_and_exit_code_two(tmp_path, monkeypatch, capsys, arguments, words):
    save_model(brightness_model(), tmp_path / "w.safetensors")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: main(arguments))
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
