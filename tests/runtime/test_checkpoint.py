"""Checkpoints on a real disk: exact, kept and deleted as promised, and never trusted when damaged."""

import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx

from pdrunet_jax.model.load import load_weights, restore_weights
from pdrunet_jax.runtime.checkpoint import Checkpoints, is_checkpoint
from pdrunet_jax.runtime.digest import DIGEST
from pdrunet_jax.runtime.errors import RunError, UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    params: Any
    stats: Any
    opt_state: Any
    ema: Any
    ema_stats: Any
    step: Any
    diverged: Any


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)


def state_of(seed: int, ema: bool = False) -> State:
    parts: Any = nnx.split(Net(nnx.Rngs(seed)), nnx.Param, nnx.BatchStat)
    _, params, stats = parts
    opt_state = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)).init(params)
    averages = [jax.tree.map(lambda x: x + 1, each) if ema else None for each in (params, stats)]
    return State(params, stats, opt_state, *averages, jnp.int32(seed), jnp.zeros((), bool))


def assert_same(found: Any, expected: Any) -> None:
    assert str(jax.tree.structure(found)) == str(jax.tree.structure(expected))
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(left), np.asarray(right)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()


def filled(folder: Path, steps: tuple[int, ...] = (3, 6)) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep_latest=3, keep_best=1)
    for step in steps:
        checkpoints.save(step, state_of(step), {"at": step}, {"digest": f"d{step}"}, val_dice=None)
    return checkpoints


def reopened(folder: Path) -> Checkpoints:
    return Checkpoints(folder, keep_latest=3, keep_best=1)


@pytest.mark.parametrize("ema", [False, True])
def test_a_training_state_comes_back_bit_for_bit_in_its_own_form(tmp_path: Path, ema: bool) -> None:
    saved = state_of(7, ema)
    Checkpoints(tmp_path, 2, 1).save(7, saved, {"next": [1, 2], "big": 2**63}, {"best": 0.1 + 0.2}, 0.5)
    restored = Checkpoints(tmp_path, 2, 1).restore(state_of(8, ema))
    assert restored is not None
    assert_same(restored.state, saved)
    assert isinstance(restored.state.params, nnx.State)
    assert (restored.step, restored.val_dice) == (7, 0.5)
    assert restored.position == {"next": [1, 2], "big": 2**63}
    assert restored.extra == {"best": 0.1 + 0.2}


def test_a_state_of_an_earlier_version_starts_the_average_of_the_statistics_from_the_latest(tmp_path: Path) -> None:
    saved = dataclasses.replace(state_of(7, ema=True), ema_stats=None)
    Checkpoints(tmp_path, 2, 1).save(7, saved, {}, {}, None)
    restored = Checkpoints(tmp_path, 2, 1).restore(state_of(8, ema=True))
    assert restored is not None
    assert_same(restored.state, dataclasses.replace(saved, ema_stats=saved.stats))


def test_every_type_and_every_bit_pattern_survives_whatever_jax_is_set_to(tmp_path: Path) -> None:
    odd = np.array([np.nan, -0.0, np.inf, 5e-324, 1 / 3])
    state = {
        "float64": odd,
        "float32": odd.astype(np.float32),
        "bfloat16": np.array([0.1, -0.0], ml_dtypes.bfloat16),
        "int32": np.array(-5, np.int32),
        "uint8": np.arange(3, dtype=np.uint8),
        "uint32": np.array(2**32 - 1, np.uint32),
        "bool": np.array([True, False]),
    }
    Checkpoints(tmp_path, 1, 1).save(0, state, {})
    restored = Checkpoints(tmp_path, 1, 1).restore(state)
    assert restored is not None
    assert_same(restored.state, state)


def test_a_checkpoint_of_an_earlier_version_that_says_halted_is_read_as_diverged(tmp_path: Path) -> None:
    saved = state_of(3)
    fields = {field.name: getattr(saved, field.name) for field in dataclasses.fields(saved)}
    fields["halted"] = ~fields.pop("diverged")
    Checkpoints(tmp_path, 1, 1).save(3, fields, {})
    restored = Checkpoints(tmp_path, 1, 1).restore(saved)
    assert restored is not None
    assert_same(restored.state, dataclasses.replace(saved, diverged=jnp.ones((), bool)))


def test_restored_arrays_do_not_make_the_step_compile_again(tmp_path: Path) -> None:
    traces = []

    @jax.jit
    def step(state: State) -> State:
        traces.append(1)
        return dataclasses.replace(state, step=state.step + 1)

    state = state_of(1)
    step(state)
    Checkpoints(tmp_path, 1, 1).save(1, state, {})
    restored = Checkpoints(tmp_path, 1, 1).restore(state)
    assert restored is not None
    step(restored.state)
    assert len(traces) == 1


def test_an_empty_folder_restores_nothing(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "new", 1, 1)
    assert checkpoints.restore(state_of(0)) is None
    assert checkpoints.latest_step() is None


def test_the_latest_and_the_best_are_kept_also_across_restarts(tmp_path: Path) -> None:
    scores: dict[int, float | None] = {1: 0.5, 2: 0.9, 3: None, 4: 0.9, 5: float("nan"), 6: 0.1, 7: 0.8, 8: 0.2}
    for step, score in scores.items():
        Checkpoints(tmp_path, keep_latest=2, keep_best=2).save(step, {"a": np.zeros(1)}, {}, val_dice=score)
    assert Checkpoints(tmp_path, 2, 2).steps() == [2, 4, 7, 8]  # of equal scores the earlier is the better
    Checkpoints(tmp_path, keep_latest=1, keep_best=1).save(9, {"a": np.zeros(1)}, {}, val_dice=0.3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "9"]


def test_a_checkpoint_that_is_a_link_is_removed_and_what_it_leads_to_is_kept(tmp_path: Path) -> None:
    Checkpoints(tmp_path / "run", 1, 1).save(1, {"a": np.zeros(1)}, {})
    (tmp_path / "run" / "1").rename(tmp_path / "elsewhere")
    (tmp_path / "run" / "1").symlink_to(tmp_path / "elsewhere")
    Checkpoints(tmp_path / "run", 1, 1).save(2, {"a": np.zeros(1)}, {})
    assert os.listdir(tmp_path / "run") == ["2"]
    assert list((tmp_path / "elsewhere").iterdir())


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path)
    checkpoints.save(6, state_of(60), {"at": 60}, val_dice=0.7)
    restored = reopened(tmp_path).restore(state_of(0))
    assert restored is not None
    assert (restored.position, restored.val_dice) == ({"at": 60}, 0.7)
    assert_same(restored.state, state_of(60))


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_damage_to_any_file_is_found_and_the_checkpoint_before_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled(tmp_path / "whole")
    newest = tmp_path / "whole" / "6"
    names = sorted(str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file())
    assert DIGEST in names
    assert len(names) >= 8
    harms = {
        "flipped": flip_bit,
        "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
        "missing": Path.unlink,
    }
    for name in names:
        for harm in harms.values():
            case = tmp_path / "case"
            shutil.copytree(tmp_path / "whole", case)
            harm(case / "6" / name)
            restored = reopened(case).restore(state_of(0))
            assert restored is not None
            assert (restored.step, restored.position) == (3, {"at": 3})
            assert_same(restored.state, state_of(3))
            warning = capsys.readouterr().err
            assert f"{case / '6'} is damaged" in warning
            assert name in warning
            shutil.rmtree(case)


@pytest.mark.parametrize("harm", ["empty", "half deleted", "digest truncated at a line"])
def test_a_folder_that_lost_its_files_is_set_aside(tmp_path: Path, harm: str) -> None:
    filled(tmp_path)
    if harm == "digest truncated at a line":
        digest = tmp_path / "6" / DIGEST
        digest.write_text("".join(digest.read_text().splitlines(keepends=True)[:3]))
    else:
        shutil.rmtree(tmp_path / "6" / ("state" if harm == "half deleted" else ""))
        (tmp_path / "6").mkdir(exist_ok=True)
    checkpoints = reopened(tmp_path)
    assert checkpoints.steps() == [3]
    restored = checkpoints.restore(state_of(0))
    assert restored is not None
    assert restored.step == 3
    assert (tmp_path / "6.damaged").is_dir()
    checkpoints.save(6, state_of(6), {"at": 6})
    assert reopened(tmp_path).steps() == [3, 6]


def test_without_an_intact_checkpoint_nothing_is_restarted_or_overwritten(tmp_path: Path) -> None:
    filled(tmp_path)
    for step in (3, 6):
        flip_bit(tmp_path / str(step) / "state" / "_METADATA")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"no checkpoint in .* is intact(.|\n)*3: state/_METADATA(.|\n)*6: state"):
        reopened(tmp_path).restore(state_of(0))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_digest_file_is_what_sha256sum_checks(tmp_path: Path) -> None:
    filled(tmp_path)
    command = ["sha256sum", "--check", "--quiet", DIGEST]
    assert subprocess.run(command, cwd=tmp_path / "6", check=False).returncode == 0
    flip_bit(tmp_path / "6" / "state" / "manifest.ocdbt")
    assert subprocess.run(command, cwd=tmp_path / "6", check=False, capture_output=True).returncode == 1


def test_what_a_killed_save_or_deletion_left_is_cleaned_up(tmp_path: Path) -> None:
    filled(tmp_path)
    shutil.copytree(tmp_path / "6", tmp_path / "tmp-writing-9")
    shutil.copytree(tmp_path / "3", tmp_path / "tmp-deleted-1")
    (tmp_path / "tmp-writing-12.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "6").rename(tmp_path / "tmp-replaced-6")  # killed between the two renames of a replacement
    assert reopened(tmp_path).steps() == [3, 6]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "6"]


def test_a_state_of_another_form_is_refused_with_every_difference(tmp_path: Path) -> None:
    filled(tmp_path)
    template = {"params": {"first": {"kernel": np.zeros((3, 5), np.float32)}}, "other": np.zeros(2)}
    with pytest.raises(UserError) as caught:
        reopened(tmp_path).restore(template)
    message = str(caught.value)
    assert "params/first/kernel is float32(3, 4), not float32(3, 5)" in message
    assert "other is missing" in message
    assert "opt_state/1/0/mu/first/kernel is not expected" in message


def test_a_failed_write_leaves_the_earlier_checkpoint_and_names_the_path(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes the operating system itself refuse the write."""
    program = f"""
        import resource, signal
        import numpy as np
        from pathlib import Path
        from pdrunet_jax.runtime.checkpoint import Checkpoints
        from pdrunet_jax.runtime.errors import RunError
        checkpoints = Checkpoints(Path({str(tmp_path)!r}), 2, 1)
        checkpoints.save(1, {{"a": np.arange(5.0)}}, {{"at": 1}})
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            checkpoints.save(2, {{"a": np.random.default_rng(0).normal(size=100_000)}}, {{"at": 2}})
        except RunError as error:
            print(error)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    assert f"cannot write the checkpoint {tmp_path / '2'}: " in result.stdout
    assert "File too large" in result.stdout
    assert result.stderr == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1"]
    restored = reopened(tmp_path).restore({"a": np.zeros(5)})
    assert restored is not None
    assert restored.position == {"at": 1}


def test_too_few_open_files_are_one_message_and_no_traceback_of_orbax(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoints = filled(tmp_path, (3,))
    in_use = len(os.listdir("/proc/self/fd" if sys.platform == "linux" else "/dev/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 9, hard))
    try:
        with pytest.raises(RunError, match=r"checkpoint .*/6: Too many open files; earlier checkpoints are intact"):
            checkpoints.save(6, state_of(6), {"at": 6})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "Traceback" not in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["3"]
    checkpoints.save(6, state_of(6), {"at": 6})
    assert checkpoints.steps() == [3, 6]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="file/checkpoints"):
        Checkpoints(tmp_path / "file" / "checkpoints", 1, 1)


def test_weights_come_from_the_best_checkpoint_and_from_the_average_if_there_is_one(tmp_path: Path) -> None:
    run = tmp_path / "run"
    checkpoints = Checkpoints(run / "checkpoints", 3, 1)
    for step, score in {1: 0.4, 2: 0.6, 3: 0.5}.items():
        checkpoints.save(step, state_of(step, ema=True), {}, {"options": {"outputs": step}}, score)
    (run / "config.toml").write_text("[model]\nfilters = 4\n[environment]\njax = '1'\n")
    params, stats, options = restore_weights(run)
    assert_same(params, nnx.to_pure_dict(jax.tree.map(np.asarray, state_of(2, ema=True).ema)))
    assert_same(stats, nnx.to_pure_dict(jax.tree.map(np.asarray, state_of(2, ema=True).ema_stats)))
    assert (options["outputs"], options["filters"], options["shortcut"]) == (2, 4, "input")
    assert restore_weights(run / "checkpoints" / "3")[2]["outputs"] == 3


def test_weights_of_a_damaged_checkpoint_are_not_used(tmp_path: Path) -> None:
    run = tmp_path / "run"
    filled(run / "checkpoints")
    flip_bit(run / "checkpoints" / "6" / "state" / "_METADATA")
    assert int(restore_weights(run)[0]["first"]["kernel"].size) == 12
    with pytest.raises(UserError, match="is damaged"):
        restore_weights(run / "checkpoints" / "6")


def test_what_is_no_file_in_the_place_of_the_best_weights_is_said(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "best.safetensors")
    with pytest.raises(UserError, match=r"best\.safetensors: a pipe, not a file"):
        load_weights(tmp_path)
    with pytest.raises(UserError, match=r"best\.safetensors: a pipe, not a file"):
        load_weights(tmp_path / "best.safetensors")


def test_a_run_folder_made_of_weights_alone_gives_them_back(tmp_path: Path) -> None:
    state, options = state_of(5), {"filters": 4, "class_names": ["bone"]}
    weights = {"params": state.params, "stats": state.stats}
    Checkpoints(tmp_path / "run" / "checkpoints", 1, 1).save(0, weights, position={}, extra={"options": options})
    params, stats, options = restore_weights(tmp_path / "run")
    assert_same(params, nnx.to_pure_dict(jax.tree.map(np.asarray, state.params)))
    assert_same(stats, nnx.to_pure_dict(jax.tree.map(np.asarray, state.stats)))
    assert options == {"filters": 4, "class_names": ["bone"]}
    assert is_checkpoint(tmp_path / "run")
    assert is_checkpoint(tmp_path / "run" / "checkpoints" / "0")
    with pytest.raises(UserError, match="weights only"):
        reopened(tmp_path / "run" / "checkpoints").restore(state)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    assert not is_checkpoint(tmp_path)
    with pytest.raises(UserError, match="neither a checkpoint nor a run folder"):
        restore_weights(tmp_path)


def test_the_position_is_plain_json_on_disk(tmp_path: Path) -> None:
    filled(tmp_path)
    stored = json.loads((tmp_path / "6" / "meta" / "metadata").read_text())
    assert stored == {"step": 6, "position": {"at": 6}, "extra": {"digest": "d6"}, "val_dice": None}
