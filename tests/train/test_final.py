"""Final evaluation: threshold from the validation set, test scores, report, and their record in W&B."""

import csv
import json
import os

import pytest

from pdrunet_jax.config import Config, DataConfig, ModelConfig, TrackingConfig, TrainConfig
from pdrunet_jax.data.dataset import open_dataset
from pdrunet_jax.model.files import read_weights, write_safetensors
from pdrunet_jax.model.load import load_weights
from pdrunet_jax.runtime.digest import CONTENT, content_digest
from pdrunet_jax.runtime.errors import RunError
from pdrunet_jax.runtime.stop import StopFlag
from pdrunet_jax.train.final import final_evaluation
from pdrunet_jax.train.progress import Progress
from pdrunet_jax.train.run import open_run
from pdrunet_jax.train.tracking import Tracker
from tests.support.tiny import brightness_model, save_dataset, save_model
from tests.support.wandb_files import history, records, summary


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Arguments of `final_evaluation` after the last step of a run, with W&B offline."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    config = Config(
        data=DataConfig(root=str(save_dataset(tmp_path / "data", errors={4: 3})), size=(24, 32), threads=1),
        train=TrainConfig(steps=20),
        model=ModelConfig(filters=1, norm="none", dropout=0.0),
        tracking=TrackingConfig(wandb="offline", artifact=True),
    )
    run, dataset = open_run(tmp_path / "run", config), open_dataset(config.data)
    file = read_weights(save_model(brightness_model(), run.best, size=[24, 32], class_names=["square"]))
    write_safetensors(run.best, file.arrays, {**file.options, CONTENT: content_digest(file.arrays, file.options)})
    tracker = Tracker(run, config, class_names=dataset.class_names)
    tracker.log(20, {"train/loss": 0.5})
    return config, run, dataset, Progress("", 20), tracker, StopFlag()


def test_scores_and_report_are_written_and_wandb_has_table_summary_pictures_and_artifact(trained):
    run, tracker = trained[1], trained[4]
    with tracker:
        line = final_evaluation(*trained)
    assert line is not None
    assert line.startswith("test dice 0.963 (95% ")
    assert load_weights(run.best).options["threshold"] == 0.5  # all are as good
    assert "Best threshold on the validation images: 0.5" in run.report.read_text()

    (found,) = records(run.path)
    last = summary(found)
    written = json.loads((run.path / "evaluation/test/summary.json").read_text())["macro"]
    assert last["test/dice"] == written["dice"]["mean"]
    assert (last["test/dice_low"], last["test/dice_high"]) == (written["dice"]["low"], written["dice"]["high"])
    assert (last["test/images"], last["test/patients"], last["test/hd95"]) == (3, 2, written["hd95"]["mean"])
    assert set(history(found, "_step")) == {20}

    (table,) = run.wandb.glob("offline-run-*/files/media/table/test/per_image_*.table.json")
    content = json.loads(table.read_text())
    with (run.path / "evaluation/test/per_image.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert content["columns"] == ["class_name" if name == "class" else name for name in rows[0]]
    assert [row[0] for row in content["data"]] == [row["image"] for row in rows]
    dice = content["columns"].index("dice")
    assert [row[dice] for row in content["data"]] == pytest.approx([float(row["dice"]) for row in rows], abs=1e-6)

    assert [caption.split(",")[0] for caption in history(found, "captions")[0]] == ["best", "best", "worst"]
    assert set(history(found, "all_masks")[0][0]) == {"prediction", "truth"}
    artifacts = [record.artifact for record in found if record.HasField("artifact")]
    artifacts += [record.request.log_artifact.artifact for record in found if record.HasField("request")]
    assert "model" in {artifact.type for artifact in artifacts}


def test_a_stopped_evaluation_is_left_to_the_next_start(trained, capsys):
    run, tracker, stop = trained[1], trained[4], trained[5]
    stop.request()
    with tracker:
        assert final_evaluation(*trained) is None
    assert "dice" not in capsys.readouterr().out
    assert not run.report.exists()
    assert "threshold" not in load_weights(run.best).options
    (found,) = records(run.path)
    assert [record.exit.exit_code for record in found if record.HasField("exit")] == [0]


def test_a_failure_is_reported_to_wandb_and_raised(trained):
    run, tracker = trained[1], trained[4]
    (run.path / "evaluation").write_text("a file where a folder should be")
    with pytest.raises(RunError, match="evaluation"), tracker:
        final_evaluation(*trained)
    (found,) = records(run.path)
    assert [record.exit.exit_code for record in found if record.HasField("exit")] == [1]
