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
from pdrunet_jax.runtime.files import atomic_write, is_present, open_in_place, replace_folder
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
    changed = config(optim={"learning_rate": 0.003}, train={"eval_every": 20, "steps": 20}, data={"threads": 1})
    with pytest.raises(UserError) as caught:
        open_run(tmp_path, changed)
    assert "  - optim.learning_rate: 0.001 -> 0.003\n  - train.eval_every: 500 -> 20\n" in str(caught.value)
    assert "--workdir" in str(caught.value)
    assert "threads" not in str(caught.value)
    assert "steps" not in str(caught.value)
    assert run.config_file.read_bytes() == before


def test_settings_without_a_part_in_the_result_may_change_and_restarts_are_recorded(tmp_path: Path) -> None:
    open_run(tmp_path, Config(), device="cpu")
    changed = config(tracking={"wandb": "disabled"}, data={"threads": 0, "cache": "none", "root": "moved"})
    run = open_run(tmp_path, changed, device="gpu")
    assert parse(run.config_file.read_text(), "config.toml") == changed
    record = tomllib.loads(run.config_file.read_text())["environment"]
    assert record["device"] == "cpu"
    assert [set(restart) - {"started", "git"} for restart in record["restarts"]] == [{"device", "changed"}]
    assert "tracking.wandb: 'auto' -> 'disabled'" in record["restarts"][0]["changed"]
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


def test_a_file_is_not_written_through_a_link_in_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    other.write_text("kept")
    (tmp_path / "file").symlink_to(other)
    names = []
    create = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *mode: (names.append((path.name, *mode)), create(path, *mode))[1])
    for text in ("new", "newer"):
        atomic_write(tmp_path / "file", text)
    monkeypatch.undo()
    assert other.read_text() == "kept"
    assert not (tmp_path / "file").is_symlink()
    assert (tmp_path / "file").read_text() == "newer"
    assert len(set(names)) == 2  # names that nobody can guess
    assert {mode for _, mode in names} == {"xb"}


def test_a_file_written_in_place_is_neither_a_link_nor_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (("link", "a symbolic link"), ("pipe", "not a regular file")):
        with pytest.raises(OSError, match=f"it is {reason}"):
            open_in_place(tmp_path / name, os.O_RDWR)
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    RunFolder(tmp_path).require_free()
    with pytest.raises(RunError, match=r"lock: cannot be written \(it is a symbolic link"), RunFolder(tmp_path).lock():
        pass
    (tmp_path / "lock").unlink()
    os.mkfifo(tmp_path / "lock")
    RunFolder(tmp_path).require_free()
    with pytest.raises(RunError, match=r"lock: cannot be written \(it is not a regular"), RunFolder(tmp_path).lock():
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_folder_of_a_run_that_is_a_link_out_of_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    run = RunFolder(tmp_path / "run")
    for folder in (run.checkpoints, run.evaluation, run.samples, run.wandb):
        folder.symlink_to(tmp_path)
        with pytest.raises(UserError, match=f"{folder} leads out of {run.path} by a link"):
            open_run(run.path, Config())
        folder.unlink()
    (tmp_path / "linked").symlink_to(run.path)
    open_run(tmp_path / "linked", Config())


def test_a_link_that_leads_nowhere_does_not_count_as_absent(tmp_path: Path) -> None:
    assert not is_present(tmp_path / "file")
    (tmp_path / "file").symlink_to("nowhere")
    with pytest.raises(UserError, match="file is a broken link to nowhere"):
        is_present(tmp_path / "file")
    (tmp_path / "nowhere").touch()
    assert is_present(tmp_path / "file")
    with pytest.raises(UserError, match="a folder, not a file"):
        is_present(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: a pipe, not a file; restore the file, or remove what has its name"):
        is_present(tmp_path / "pipe")


def test_what_a_killed_process_was_writing_is_removed_once_the_folder_is_locked(tmp_path: Path) -> None:
    for name in (".pdrunet-0123456789abcdef.tmp", ".other.tmp"):
        (tmp_path / name).touch()
    with RunFolder(tmp_path).lock():
        assert sorted(os.listdir(tmp_path)) == [".other.tmp", "lock"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_gives_way_to_a_new_one_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    """Where the file system cannot exchange names, in two steps."""
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    renames = []
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, target: (renames.append(path.name), rename(path, target))[1])
    if not exchange:
        monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: None)
    replace_folder(tmp_path / "new", tmp_path / "old")
    assert (os.listdir(tmp_path / "old"), os.listdir(tmp_path / "new")) == (["new"], ["old"])
    assert renames == ([] if exchange else ["old", "new", "new-replaced"])


def test_the_git_revision_is_that_of_the_package_if_it_is_tracked() -> None:
    revision = git_revision()
    assert environment().get("git") == revision
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode == 0 and revision is not None:
        assert revision.removesuffix("-dirty") == found.stdout.strip()
