"""The examples do what they say."""

import itertools
import runpy
import struct
import sys
from pathlib import Path

import pytest
import yaml

from pdrunet_jax.train import options
from tests.support import ROOT


def test_every_trial_of_the_sweep_is_a_command_that_train_takes() -> None:
    sweep = yaml.safe_load((ROOT / "examples" / "sweep.yaml").read_text())
    names, grid = zip(*sweep["parameters"].items(), strict=True)
    trials = []
    for values in itertools.product(*(each.get("values", [each.get("value")]) for each in grid)):
        given = (f"--{name}={value}" for name, value in zip(names, values, strict=True))
        trials.append(options.parse(["--config", "phantom", *given]))
    assert len({str(trial.settings) for trial in trials}) == 4
    assert {trial.settings.train.patience for trial in trials} == {2}
    assert "pdrunet_jax.train --config phantom" in sweep["command"][2]


def test_tensorboard_events_hold_every_number_of_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    lines = (
        '{"step": 10, "train/loss": 0.5, "data/sequence": "a"}\n{"step": 20, "val/dice": 0.75, "train/loss": null}\n'
    )
    (tmp_path / "metrics.jsonl").write_text(lines)
    monkeypatch.setattr(sys, "argv", ["tensorboard.py", str(tmp_path)])
    for _ in range(2):
        runpy.run_path(str(ROOT / "examples" / "tensorboard.py"))
    (file,) = tmp_path.glob("events.out.tfevents.*")
    content, found, place = file.read_bytes(), [], 0
    while place < len(content):  # length, its checksum, an event, its checksum
        (size,) = struct.unpack_from("<Q", content, place)
        event = event_pb2.Event.FromString(content[place + 12 : place + 12 + size])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        place += size + 16
    assert found == [(10, "train/loss", 0.5), (20, "val/dice", 0.75)]
