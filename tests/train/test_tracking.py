"""Run output: exact metrics.jsonl, lines or a progress bar, and W&B whose failures never reach the run."""

import fcntl
import json
import math
import os
import pty
import resource
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pdrunet_jax.config import Config, from_dict
from pdrunet_jax.runtime.errors import RunError
from pdrunet_jax.runtime.run_folder import RunFolder, read_entries
from pdrunet_jax.train.tracking import MetricsLog, Tracker
from pdrunet_jax.train.wandb_run import Picture, WandbRun, logged_in
from tests.support import ROOT
from tests.support.fake_wandb import serve
from tests.support.wandb_files import history, records


def config(wandb: str = "disabled", **train: Any) -> Config:
    return from_dict({"tracking": {"wandb": wandb}, "train": {"steps": 20} | train}, "the test")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    return folder


@pytest.fixture(autouse=True)
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in [name for name in os.environ if name.startswith("WANDB_")] + ["NETRC"]:
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "run" / "wandb" / "cache"))


def test_numbers_read_back_as_the_same_floats_and_what_is_not_finite_is_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    values = [0.1 + 0.2, 1e-300, 1e22, float(np.float32(1 / 3)), -0.0]
    for step, value in enumerate(values):
        log.append(step, {"train/loss": value})
    log.append(9, {"a": math.nan, "b": jnp.float32(np.inf), "c": np.int64(3), "d": jnp.array([0.5]), "e": "x"})
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [line["train/loss"].hex() for line in lines[:-1]] == [value.hex() for value in values]
    assert lines[-1] == {"step": 9, "a": None, "b": None, "c": 3, "d": 0.5, "e": "x"}
    assert next(iter(lines[-1])) == "step"


def test_resuming_drops_later_lines_and_a_half_written_one_and_leaves_the_rest_as_it_was(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (10, 20, 20, 30):
        log.append(step, {"train/loss": step / 3})
    kept = b"".join(log.path.read_bytes().splitlines(keepends=True)[:3])
    with log.path.open("ab") as file:
        file.write(b'{"step": 1, "train/lo')
    assert [entry["step"] for entry in read_entries(log.path) if entry] == [10, 20, 20, 30]
    log.truncate_after(20)
    assert log.path.read_bytes() == kept
    log.truncate_after(20)
    log.append(30, {})
    assert log.path.read_bytes() == kept + b'{"step": 30}\n'


def test_a_line_that_cannot_be_written_is_reported_with_the_file(tmp_path: Path) -> None:
    for place, reason in ((Path("/dev/full"), "not a regular file"), (tmp_path / "link", "a symbolic link")):
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(RunError, match=rf"{place}: cannot be written \(it is {reason}"):
            MetricsLog(place).append(1, {"train/loss": 1.0})
    assert not (tmp_path / "elsewhere").exists()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(RunError, match=r"metrics\.jsonl: cannot be written"):
            MetricsLog(tmp_path / "metrics.jsonl").append(1, {"train/loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_away_from_a_terminal_every_log_step_is_a_line(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"train/loss": 0.5, "train/dice": 0.25, "time/images_per_second": 12.34, "time/data_wait": 0.07}
    with Tracker(run, config()) as tracker:
        tracker.log(10, values)
        tracker.validation(10, {"val/dice": 0.9, "val/loss": float("nan")})
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith("step 10/20, loss 0.5000, Dice 0.2500, images/s 12.3, data wait 7%, 00:0")
    assert lines[1] == "validation at step 10: dice 0.9000"
    assert (len(lines), err) == (2, "")


def test_on_a_terminal_there_is_a_bar_that_starts_at_the_resumed_step(run: RunFolder) -> None:
    program = f"""
from pdrunet_jax.config import from_dict
from pdrunet_jax.runtime.run_folder import RunFolder
from pdrunet_jax.train.tracking import Tracker
config = from_dict({{"tracking": {{"wandb": "disabled"}}, "train": {{"steps": 20}}}}, "")
with Tracker(RunFolder({str(run.path)!r}), config, step=10) as tracker:
    tracker.log(15, {{"train/loss": 0.5}})
    tracker.validation(15, {{"val/dice": 0.75}})
"""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 120, 0, 0))
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=theirs, text=True) as process:
        os.close(theirs)
        bar = b""
        try:
            while chunk := os.read(ours, 4096):
                bar += chunk
        except OSError:  # the other side is closed
            pass
        assert process.stdout is not None
        assert process.stdout.read() == "validation at step 15: dice 0.7500\n"
    os.close(ours)
    assert b"10/20" in bar
    assert b"15/20" in bar
    assert b"loss 0.5000" in bar


def test_a_resumed_tracker_continues_the_same_file(run: RunFolder) -> None:
    with Tracker(run, config()) as first:
        for step in (5, 10, 15):
            first.log(step, {"train/loss": 1.0})
    with Tracker(run, config(), step=10) as second:
        second.log(15, {"train/loss": 2.0})
    entries = [(entry["step"], entry["train/loss"]) for entry in read_entries(run.metrics) if entry]
    assert entries == [(5, 1.0), (10, 1.0), (15, 2.0)]


def test_a_tracker_without_a_folder_prints_and_writes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with Tracker(None, config("online")) as tracker:
        tracker.say("a line")
        tracker.log(10, {"train/loss": 0.5})
        tracker.validation(10, {"val/dice": 0.5})
        tracker.scores(10, "test", {}, ((), ()), ())
    assert capfd.readouterr() == ("", "")


def test_a_key_in_the_environment_or_netrc_means_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not logged_in()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".netrc").write_text("machine example.org login user password x\n")
    assert not logged_in()
    with (tmp_path / "home" / ".netrc").open("a") as file:
        file.write(f"machine api.wandb.ai login user password {'a' * 40}\n")
    assert logged_in()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not logged_in()
    monkeypatch.setenv("WANDB_API_KEY", "b" * 40)
    assert logged_in()


def test_an_offline_run_holds_config_metrics_and_masks_and_nothing_secret(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "c0ffee" * 6 + "abcd")
    monkeypatch.setenv("SOME_TOKEN", "canary-8d1f")
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    mask = (grey[..., 0] > 30).astype(np.uint8)
    for start in (0, 10):  # the second time the run is resumed
        with Tracker(run, config("offline"), step=start, class_names=("femur",)) as tracker:
            tracker.log(start + 5, {"train/loss": 0.5, "data/sequence": "text"})
            tracker.validation(start + 10, {"val/dice": 0.25 + start / 40}, [Picture("case", grey, mask, mask)])
    first, second = records(run.path)
    assert history(first, "val/dice") == [0.25]
    assert history(second, "val/dice") == [0.5]
    assert history(second, "_step") == [15, 20]
    started = [record.run for found in (first, second) for record in found if record.HasField("run")]
    assert len({record.run_id for record in started}) == 1
    assert started[0].display_name == "run"
    settings = {item.key: json.loads(item.value_json) for item in started[0].config.update}
    assert settings["optim"]["learning_rate"] == 0.001
    maxima = {
        record.metric.name: record.metric.summary.max
        for found in (first,)
        for record in found
        if record.HasField("metric")
    }
    assert maxima["val/dice"]
    assert history(first, "captions") == [["case"]]
    assert set(history(first, "all_masks")[0][0]) == {"prediction", "truth"}
    assert list(run.wandb.glob("offline-run-*/files/media/images/**/*.png"))
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert all(run.wandb in path.parents for path in written if path != run.metrics)
    for path in written:
        data = path.read_bytes()
        assert b"canary-8d1f" not in data
        assert b"c0ffeec0ffee" not in data


def test_the_parts_of_a_resumed_offline_run_are_synced_as_one(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped twice offline; between them an online part whose server failed at the start."""
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    with serve("accepts") as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        for start, mode in ((0, "offline"), (5, "online"), (10, "offline")):
            server.behaviour = "errors"
            with Tracker(run, config(mode), step=start) as tracker:
                for step in range(start + 1, start + 6):
                    tracker.log(step, {"train/loss": step / 10})
        server.behaviour = "accepts"
        for part in sorted(run.wandb.glob("offline-run-*")):
            command = [sys.executable, "-m", "wandb", "sync", str(part.absolute())]
            subprocess.run(command, check=True, capture_output=True, cwd=run.path)  # it writes a log there
    assert [line["_step"] for line in server.history] == [*range(1, 16)]


def test_the_variables_of_wandb_fill_in_what_no_option_says(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PROJECT": "bones", "NAME": "monday", "ENTITY": "clinic", "TAGS": "a,b"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setenv("WANDB_MODE", "offline")
    given = from_dict({"tracking": {"project": "mine", "name": "tuesday", "tags": ["c"]}}, "the test")
    for settings in (config("auto"), given):
        Tracker(run, settings).__exit__(None, None, None)
    found = [record.run for part in records(run.path) for record in part if record.HasField("run")]
    told = {(item.project, item.display_name, item.entity, tuple(item.tags)) for item in found}
    assert told == {("bones", "monday", "clinic", ("a", "b")), ("mine", "tuesday", "clinic", ("c",))}
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert WandbRun(run, config("auto"), {}).place == ""


@pytest.fixture(params=["refuses", "errors", "hangs"])
def bad_server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A W&B server on loopback that refuses connections, answers with errors, or never answers."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    open_connections = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            open_connections.append(connection)
            if request.param == "errors":
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 500 Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                connection.close()

    if request.param != "refuses":
        listener.listen()
        threading.Thread(target=serve, daemon=True).start()
    yield request.param
    listener.close()
    for connection in open_connections:
        connection.close()


ONE_RUN = """
import sys
from pdrunet_jax.config import from_dict
from pdrunet_jax.runtime.run_folder import RunFolder
from pdrunet_jax.train.tracking import Tracker
with Tracker(RunFolder(sys.argv[1]), from_dict({"train": {"steps": 20}}, "the test")) as tracker:
    tracker.log(10, {"train/loss": 0.5})
"""


def test_a_server_that_fails_costs_a_warning_and_a_bounded_wait_and_the_run_is_kept_offline(
    run: RunFolder, bad_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    command = [sys.executable, "-c", ONE_RUN, str(run.path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=25)
    assert result.stderr.count("warning: W&B could not start online") == 1
    assert "Traceback" not in result.stderr
    assert "W&B: offline" in result.stdout
    assert [entry["step"] for entry in read_entries(run.metrics) if entry] == [10]
    assert history(records(run.path)[0], "train/loss") == [0.5]


def test_a_trial_of_a_sweep_has_the_id_that_the_agent_gave_it(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    monkeypatch.setenv("WANDB_RUN_ID", "trial7")
    with Tracker(run, config("offline")):
        pass
    assert (run.wandb / "id").read_text() == "trial7"


BROKEN_SERVICE = """
import os, sys
from pdrunet_jax.config import from_dict
from pdrunet_jax.runtime.run_folder import RunFolder
from pdrunet_jax.train import wandb_run
from pdrunet_jax.train.tracking import Tracker
from tests.support.wandb_files import wandb_service
wandb_run.CALL_TIMEOUT, wandb_run.GRACE = 2, 1
with Tracker(RunFolder(sys.argv[1]), from_dict({"tracking": {"wandb": "offline"}}, "the test")) as tracker:
    print(service := wandb_service())
    os.kill(service, int(sys.argv[2]))
    tracker.log(10, {"train/loss": 0.5})
    tracker.scores(10, "test", {"dice": 0.5}, (["dice"], [[0.5]]), [])
"""


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_wandb_service_that_dies_or_hangs_does_not_keep_the_process(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: signal.Signals
) -> None:
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "1")
    command = [sys.executable, "-c", BROKEN_SERVICE, str(run.path), str(int(fault))]
    out, err = tmp_path / "out", tmp_path / "err"  # files: a stopped service keeps pipes open
    with out.open("w") as stdout, err.open("w") as stderr:
        subprocess.run(command, stdout=stdout, stderr=stderr, check=True, timeout=60, cwd=ROOT)
    if fault == signal.SIGSTOP:
        os.kill(int(out.read_text().splitlines()[1]), signal.SIGKILL)
    assert err.read_text().count("warning: W&B could not") == 1
    assert "Traceback" not in err.read_text()
    assert [entry["step"] for entry in read_entries(run.metrics) if entry] == [10]


def test_any_failure_inside_wandb_is_one_warning(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = Picture("x", np.zeros((4, 4), np.uint8), np.zeros((2, 2, 2), np.uint8), np.zeros((4, 4), np.uint8))
    tracker = Tracker(run, config("offline"))
    tracker.validation(5, {"val/dice": 0.5}, [wrong])
    tracker.validation(10, {"val/dice": 0.5}, [wrong])
    with pytest.raises(RunError, match="not finite"), tracker:
        raise RunError("the loss is not finite")
    err = capsys.readouterr().err
    assert err.count("warning: W&B") == err.count("warning: W&B could not log") == 1
    assert len(read_entries(run.metrics)) == 2
    (found,) = records(run.path)
    assert [record.exit.exit_code for record in found if record.HasField("exit")] == [1]


def test_wandb_is_neither_imported_nor_written_when_disabled(run: RunFolder) -> None:
    program = f"""
import sys
from pdrunet_jax.config import Config, TrackingConfig
from pdrunet_jax.runtime.run_folder import RunFolder
from pdrunet_jax.train.wandb_run import WandbRun
WandbRun(RunFolder({str(run.path)!r}), Config(tracking=TrackingConfig(wandb="disabled")), {{}}).finish("finished")
assert "wandb" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    assert WandbRun(run, config("disabled"), {}).place == ""
    assert not run.wandb.exists()
