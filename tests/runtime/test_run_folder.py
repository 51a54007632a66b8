"""Run folder: one trainer at a time, one configuration, files that are complete or absent."""

import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pdrunet_jax.config import Config, from_dict, parse
from pdrunet_jax.runtime.errors import RunError, UserError
from pdrunet_jax.runtime.files import atomic_write
from pdrunet_jax.runtime.run_folder import RunFolder, environment, git_revision
from pdrunet_jax.train.run import open_run

HOLD = """
import sys, time
from pdrunet_jax.runtime.run_folder import RunFolder
with RunFolder(sys.argv[1]).lock():
    print("locked", flush=True)
    time.sleep(60)
"""


def config(**settings: dict[str, object]) -> Config:
    return from_dict(settings, "the test")


@pytest.fixture
def holder(tmp_path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


def test_a_second_process_is_refused_and_told_who_has_the_folder(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with holder:
        try:
            with pytest.raises(UserError, match=f"in use by process {holder.pid} on "), RunFolder(tmp_path).lock():
                pass
            with pytest.raises(UserError, match="in use"):
                open_run(tmp_path, Config())
        finally:
            holder.kill()


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with holder:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    with RunFolder(tmp_path).lock():
        assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")


def test_the_lock_is_given_back_at_the_end(tmp_path: Path) -> None:
    run = open_run(tmp_path, Config())
    for _ in range(2):
        with run.lock():
            pass


def test_the_configuration_is_written_whole_with_versions_and_reads_back(tmp_path: Path) -> None:
    settings = config(optim={"learning_rate": 0.1 + 0.2}, data={"classes": {"femur": 1}})
    run = open_run(tmp_path / "a" / "b", settings, device="cpu (2 cores), float32")
    text = run.config_file.read_text()
    assert parse(text, "config.toml") == settings
    record = tomllib.loads(text)["environment"]
    assert record["device"] == "cpu (2 cores), float32"
    assert {"started", "python", "platform", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain"} <= set(
        record
    )


def test_no_environment_variable_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "canary-8d1f")
    run = open_run(tmp_path, Config())
    assert "canary-8d1f" not in run.config_file.read_text()


def test_another_learning_rate_is_refused_with_a_diff_and_nothing_changes(tmp_path: Path) -> None:
    run = open_run(tmp_path, Config())
    before = run.config_file.read_bytes()
    changed = config(optim={"learning_rate": 0.003}, train={"steps": 20}, data={"threads": 1})
    with pytest.raises(UserError) as caught:
        open_run(tmp_path, changed)
    assert "  - optim.learning_rate: 0.001 -> 0.003\n  - train.steps: 10000 -> 20\n" in str(caught.value)
    assert "--workdir" in str(caught.value)
    assert "threads" not in str(caught.value)
    assert run.config_file.read_bytes() == before


def test_settings_without_a_part_in_the_result_may_change_and_restarts_are_recorded(tmp_path: Path) -> None:
    open_run(tmp_path, Config(), device="cpu")
    changed = config(tracking={"wandb": "disabled"}, data={"threads": 0, "cache": "none", "root": "moved"})
    run = open_run(tmp_path, changed, device="gpu")
    assert parse(run.config_file.read_text(), "config.toml") == changed
    record = tomllib.loads(run.config_file.read_text())["environment"]
    assert record["device"] == "cpu"
    assert [set(restart) - {"started"} for restart in record["restarts"]] in ([{"device"}], [{"device", "git"}])
    assert record["restarts"][0]["device"] == "gpu"


def test_a_workdir_that_is_a_file_or_below_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        open_run(tmp_path / "file", Config())
    with pytest.raises(RunError, match="file/run"):
        open_run(tmp_path / "file" / "run", Config())


def test_a_damaged_configuration_is_named(tmp_path: Path) -> None:
    run = open_run(tmp_path, Config())
    run.config_file.write_text("[optim\n")
    with pytest.raises(UserError, match=r"config\.toml is not valid TOML"):
        open_run(tmp_path, Config())


def test_a_failed_write_leaves_the_earlier_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, "before")
    program = f"""
import resource, signal
from pathlib import Path
from pdrunet_jax.runtime.files import atomic_write
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
atomic_write(Path({str(path)!r}), b"x" * 5000)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "OSError" in result.stderr
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for data in (b"\x00\xff", "zwölf"):
        atomic_write(path, data)
        assert path.read_bytes() == (data if isinstance(data, bytes) else data.encode())
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_is_not_written_through_a_link_in_its_way(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("kept")
    (tmp_path / ".file.tmp").symlink_to(other)
    (tmp_path / "file").symlink_to(other)
    atomic_write(tmp_path / "file", "new")
    assert other.read_text() == "kept"
    assert not (tmp_path / "file").is_symlink()
    assert (tmp_path / "file").read_text() == "new"


def test_the_git_revision_is_that_of_the_package_if_it_is_tracked() -> None:
    revision = git_revision()
    assert environment().get("git") == revision
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode == 0 and revision is not None:
        assert revision.removesuffix("-dirty") == found.stdout.strip()
