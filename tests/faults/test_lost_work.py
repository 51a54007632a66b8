"""Work lost or mixed up in ways that no signal or damage announces: output that fails, checkpoints that are gone, files
of another run, data that changes, a disk without inodes.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from pdrunet_jax.config import read
from pdrunet_jax.evaluate.__main__ import main as evaluate
from pdrunet_jax.model.load import load_weights
from pdrunet_jax.runtime.checkpoint import checkpoint_faults, checkpoint_steps
from pdrunet_jax.runtime.digest import seal
from pdrunet_jax.runtime.errors import RunError, UserError
from pdrunet_jax.runtime.processes import Group
from pdrunet_jax.runtime.run_folder import RunFolder
from pdrunet_jax.train.loop import save
from pdrunet_jax.train.progress import Progress
from pdrunet_jax.train.run import open_run
from pdrunet_jax.train.verify import verify
from tests.faults.test_damage import everything, flip
from tests.faults.test_disk import may_mount
from tests.support.live import EVAL_EVERY, STEPS, Place, assert_same_run, done, read_until, resumed_at


def until(condition: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def python(program: str, **streams: Any) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", program]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, timeout=60, **streams)


def copied(place: Place, name: str) -> RunFolder:
    return RunFolder(shutil.copytree(place.undisturbed, place.path / name))


# Output that fails


def test_training_stops_when_nobody_reads_it_and_goes_on_without_room_for_its_log(place: Place) -> None:
    """`| head` stops it as a signal does; a full disk under the log does not."""
    run = place.path / "unheard"
    with place.start(workdir=run) as process:
        assert read_until(process, 2, [])
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        err = process.stderr.read()
    assert process.returncode == 75
    assert err == "warning: standard output cannot be written (Broken pipe); stopping, with everything saved\n"
    assert checkpoint_steps(run / "checkpoints")[-1] == done(run) < STEPS

    command = [sys.executable, "-m", "pdrunet_jax.train", "--config", "tiny.toml", "--workdir", str(run)]
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            command, cwd=place.path, env=place.environment, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert result.returncode == 1
    warning, error = result.stderr.splitlines()
    assert "No space left on device" in warning
    assert error.startswith(f"error: training is done and everything is saved in {run}, but lines are missing")
    assert_same_run(run, place.undisturbed)


def test_a_name_that_the_terminal_cannot_show_is_printed_in_another_form() -> None:
    program = "from pdrunet_jax.runtime import cli; cli.guard_output(); print('Kn\\u00f6chel')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = python(program, stdout=subprocess.PIPE, env=environment)
    assert (result.returncode, result.stdout, result.stderr) == (0, "Kn\\xf6chel\n", "")


def test_a_closed_standard_output_is_no_failure() -> None:
    program = "import sys; from pdrunet_jax.runtime import cli; out = cli.guard_output(); sys.stdout.write('x\\n');"
    command = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-c", program + "sys.exit(bool(out.lost))"]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_reader_that_has_stalled_does_not_keep_a_stopped_process_from_saving(tmp_path: Path) -> None:
    program = (
        "from pathlib import Path; from pdrunet_jax.runtime import cli, stop\n"
        f"with stop.StopFlag(last=True) as flag:\n    cli.guard_output(flag); Path({str(tmp_path / 'up')!r}).touch()\n"
        f"    print('x' * 1000000)\n    Path({str(tmp_path / 'saved')!r}).touch()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        until((tmp_path / "up").exists)
        time.sleep(0.5)
        assert not (tmp_path / "saved").exists()  # it waits for a reader
        process.terminate()
        until((tmp_path / "saved").exists, 10)
        process.wait(10)


# Checkpoints that are gone


def test_a_run_without_its_checkpoints_is_refused_and_nothing_is_overwritten(place: Place) -> None:
    run = copied(place, "emptied")
    for checkpoint in run.checkpoints.iterdir():
        shutil.rmtree(checkpoint)
    before = everything(run.path)
    result = place.train(workdir=run.path)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {run.checkpoints} has no checkpoint, but {run.path} holds a run")
    assert "Restore its checkpoints to resume it, or choose another --workdir" in result.stderr
    after = everything(run.path)
    assert all(after[path] == data for path, data in before.items() if path.name not in ("config.toml", "lock"))


@pytest.mark.parametrize("name", ["metrics.jsonl", "best.safetensors", "report.html", "checkpoints.txt"])
def test_each_file_of_a_run_shows_that_there_were_checkpoints(place: Place, tmp_path: Path, name: str) -> None:
    shutil.copy(place.undisturbed / name, tmp_path)
    with pytest.raises(UserError, match=name):
        RunFolder(tmp_path).require_new(3)


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.metrics.write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 3)))
    run.require_new(3)
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        run.require_new(2)


def test_checkpoints_that_cannot_be_read_are_not_taken_for_none(place: Place) -> None:
    folder = copied(place, "unreadable").checkpoints
    folder.chmod(0o300)
    user = os.geteuid()
    try:
        if user == 0:  # root may read everything
            os.seteuid(65534)
        with pytest.raises(RunError, match="cannot be read"):
            checkpoint_steps(folder)
    finally:
        os.seteuid(user)
        folder.chmod(0o700)


def test_metrics_are_on_disk_before_the_checkpoint_that_follows_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Place
) -> None:
    run = RunFolder(tmp_path)
    run.metrics.write_text('{"step": 1}\n')
    events: list[str] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (events.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    training: Any = SimpleNamespace(
        batches=SimpleNamespace(get_state=dict),
        checkpoints=SimpleNamespace(save=lambda *_: events.append("saved")),
        config=read(place.undisturbed / "config.toml"),
        dataset=SimpleNamespace(class_names=("bone",), swap_on_flip=(), multilabel=False),
        group=Group(),
        outputs=1,
        run=run,
    )
    save(training, None, Progress(data="x", step=1))  # type: ignore[arg-type]
    assert events[:3] == [str(run.metrics), str(tmp_path), "saved"]


# Files of another run


def older(checkpoint: Path) -> None:
    """Make a checkpoint as version 0.1 did: without options and settings."""
    path = checkpoint / "meta" / "metadata"
    meta = json.loads(path.read_text())
    del meta["extra"]["options"], meta["extra"]["settings"]
    path.write_text(json.dumps(meta))
    seal(checkpoint)


def test_size_and_classes_come_from_the_run_whatever_its_weights_are_read_from(place: Place) -> None:
    run = copied(place, "sizes")
    best = load_weights(run.path).options
    assert (best["size"], best["class_names"]) == ([32, 32], ["bone"])
    newest = run.checkpoints / str(STEPS)
    flip(run.best, 8 * 20_000)
    for weights in (run.path, newest):
        found = load_weights(weights).options
        assert (found["size"], found["class_names"]) == ([32, 32], ["bone"])
    older(newest)
    assert load_weights(newest).options["size"] == [32, 32]


def test_an_edited_configuration_is_not_trusted(place: Place) -> None:
    run = copied(place, "edited")
    text = run.config_file.read_text()
    for was, now, message in (
        (
            "size = [\n    32,\n]",
            "size = [\n    64,\n]",
            r"size is \[64, 64\] in config.toml, \[32, 32\] in the weights",
        ),
        ("split_seed = 0", "split_seed = 1", "settings of data or training differ"),
    ):
        assert was in text
        run.config_file.write_text(text.replace(was, now))
        for weights in (run.path, run.best, run.checkpoints / str(STEPS)):
            with pytest.raises(UserError, match=message):
                evaluate(["--weights", str(weights), "--data.root", str(place.path / "data")])
        with pytest.raises(RunError, match=rf"checkpoints/{STEPS}: .* not of one run"):
            verify(run.path)


def test_a_run_without_its_configuration_goes_on_with_its_own_settings_only(place: Place) -> None:
    run = copied(place, "unconfigured")
    settings = read(run.config_file)
    run.config_file.unlink()
    other = dataclasses.replace(settings, optim=dataclasses.replace(settings.optim, learning_rate=0.1))
    before = everything(run.path)
    with pytest.raises(UserError, match=r"config\.toml is gone, and the checkpoints next to it were saved with other"):
        open_run(run.path, other)
    assert everything(run.path).items() - before.items() <= {(run.path / "lock", (run.path / "lock").read_bytes())}
    with pytest.raises(RunError, match=r"config\.toml"):
        verify(run.path)
    open_run(run.path, settings)
    assert read(run.config_file) == settings
    shutil.rmtree(run.checkpoints)
    run.config_file.unlink()
    with pytest.raises(UserError, match="has no checkpoint, but"):
        open_run(run.path, other)
    assert not run.config_file.exists()


def test_metadata_of_a_checkpoint_are_checked_although_its_digest_matches(place: Place) -> None:
    run = copied(place, "absurd")
    newest = run.checkpoints / str(STEPS)
    path = newest / "meta" / "metadata"
    good = json.loads(path.read_text())
    for change in ({"step": "many"}, {"step": 1 << 70}, {"extra": None}, {"position": 3}, {"val_dice": {}}):
        path.write_text(json.dumps(good | change))
        seal(newest)
        assert "not valid" in checkpoint_faults(newest)[0]
    path.write_text('{"step": ' + "9" * 5000 + "}")
    seal(newest)
    assert "cannot be read" in checkpoint_faults(newest)[0]
    known = Progress(data="x", step=3).to_dict()
    for change in ({"best_dice": "high"}, {"data": None}, {"validated": [1]}, {"sequence": 5}):
        with pytest.raises(UserError, match=f"no valid {next(iter(change))}"):
            Progress.resumed(known | change, 3, "x", "", run.path)


def test_weights_and_checkpoints_of_another_run_are_refused(place: Place) -> None:
    other = RunFolder(place.path / "another")
    assert place.train("--data.split-seed", "1", workdir=other.path).returncode == 0
    run = copied(place, "mixed")
    shutil.copy(other.best, run.best)
    with pytest.raises(UserError, match="settings of data or training differ"):
        load_weights(run.path)
    with pytest.raises(RunError, match=r"best\.safetensors.* not of one run"):
        verify(run.path)
    shutil.copy(place.undisturbed / "best.safetensors", run.best)
    shutil.rmtree(run.checkpoints)
    shutil.copytree(other.checkpoints, run.checkpoints)
    result = place.train(workdir=run.path)
    assert result.returncode == 2
    assert "was saved with other settings" in result.stderr
    assert run.best.read_bytes() == (place.undisturbed / "best.safetensors").read_bytes()


# Data that changes


def test_data_that_changed_during_training_is_not_scored(place: Place) -> None:
    run, data = RunFolder(place.path / "shifting"), Path(shutil.copytree(place.path / "data", place.path / "shifted"))
    with place.start("--data.root", "shifted", workdir=run.path) as process:
        assert read_until(process, EVAL_EVERY + 1, [])
        mask = next((data / "masks").glob("*.png"))
        before, times = mask.read_bytes(), mask.stat()
        Image.open(mask).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(mask)
        os.utime(mask, ns=(times.st_atime_ns, times.st_mtime_ns))
        out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert err.startswith("error: images or masks of shifted have changed since training was started")
    assert mask.stem in err
    assert "test dice" not in out
    assert not (run.path / "evaluation").exists()

    # As if the process had been killed between the last checkpoint and the best weights.
    mask.write_bytes(before)
    meta = json.loads((run.checkpoints / str(STEPS) / "meta" / "metadata").read_text())
    if meta["extra"]["best_step"] == STEPS:
        run.best.unlink()
    result = place.train("--data.root", "shifted", workdir=run.path)
    assert (result.returncode, result.stderr) == (0, "")
    assert resumed_at(result.stdout) == STEPS
    assert_same_run(run.path, place.undisturbed)


# A disk without inodes or bytes


@pytest.mark.skipif(not may_mount(), reason="no mount namespaces here")
def test_without_inodes_or_bytes_saving_fails_at_once_with_one_message() -> None:
    program = (
        "import numpy as np; from pathlib import Path; from pdrunet_jax.runtime import checkpoint, cli\n"
        "def save():\n"
        "    for step in (1, 2):\n"
        "        store = checkpoint.Checkpoints(Path('/mnt/checkpoints'), 3, 1)\n"
        "        store.save(step, {'a': np.zeros(3), 'b': np.zeros((3, 3))}, {})\n"
        "cli.run(save)"
    )
    began = time.monotonic()
    for room in ("nr_inodes=6", "nr_inodes=45", "size=48k"):  # none for a first checkpoint, or for a second one
        mount = f"mount -t tmpfs -o {room} tmpfs /mnt"
        command = ["unshare", "--map-root-user", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh"]
        result = subprocess.run(
            [*command, sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=100
        )
        assert result.returncode == 1
        assert result.stderr.startswith("error: cannot write the checkpoint /mnt/checkpoints/")
        assert "No space left on device" in result.stderr
        assert result.stderr.count("\n") == 1
    assert time.monotonic() - began < 60
