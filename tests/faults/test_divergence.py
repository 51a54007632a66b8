"""Losses that are not finite or that jump: stopped or skipped before the update, with the samples that did it."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from pdrunet_jax import config as config_io
from pdrunet_jax.model.load import load_model
from pdrunet_jax.train.step import MOST_IN_ROW, build_model, create_state, make_train_step
from tests.support.live import Place, assert_same_run, lines_of, resumed_at

WINDOW = 4


def state_of(checkpoint: Path) -> dict[str, Any]:
    with ocp.PyTreeCheckpointer() as checkpointer:
        state: dict[str, Any] = checkpointer.restore(checkpoint / "state")
    return state


def test_a_loss_that_is_not_finite_stops_the_run_and_the_state_before_it_is_a_checkpoint(place: Place) -> None:
    run = place.path / "diverged"
    options = ("--optim.learning-rate", "1e30", "--train.save-every", "30", "--train.log-every", "5")
    result = place.train(*options, workdir=run)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    report = json.loads((run / "not_finite.json").read_text())
    assert f"the loss or a gradient of step {report['step']} is not finite" in result.stderr
    assert len(report["samples"]) == 2
    assert all((place.path / "data" / sample).is_file() for sample in report["samples"])
    good = max(int(path.name) for path in (run / "checkpoints").iterdir())
    assert good == report["step"] - 1
    state = state_of(run / "checkpoints" / str(good))
    assert (int(state["step"]), bool(state["diverged"])) == (good, False)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert load_model(run, which="latest").outputs == 1
    again = place.train(*options, workdir=run)  # from that checkpoint, to the same end
    assert resumed_at(again.stdout) == good
    assert again.stderr == result.stderr
    assert json.loads((run / "not_finite.json").read_text()) == report


def setting(**train: Any) -> Any:
    sections = {
        "model": {"filters": 2, "dropout": 0.0, "conv": "plain", "norm": "none"},
        "train": {"steps": 100, "spike_window": WINDOW, **train},
        "optim": {"name": "sgd", "learning_rate": 0.001},
        "loss": {"name": "bce"},
    }
    return config_io.from_dict(sections, "test")


def batch(hard: bool = False) -> dict[str, np.ndarray]:
    image = np.full((2, 16, 16, 1), 128, np.uint8)
    image[:, :8] = 255 if hard else 129
    image[0, 0, 0] = 0
    return {
        "image": image,
        "mask": np.full((2, 16, 16), int(hard), np.uint8),
        "index": np.arange(2, dtype=np.int32),
        "epoch": np.zeros(2, np.int32),
    }


def started(config: Any) -> tuple[Any, Any]:
    """The compiled step, and a state whose weights call everything background, so that a hard batch costs a lot."""
    graphdef, state = create_state(config, build_model(config, 1))
    state.params["final_conv"]["bias"] = jax.tree.map(lambda bias: bias - 4, state.params["final_conv"]["bias"])
    return make_train_step(config, graphdef, 1), state


def copy(tree: Any) -> Any:
    return jax.tree.map(np.array, tree)  # the step takes the buffers of its argument for its result


def same(one: Any, two: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True))


def test_a_spike_is_skipped_and_counted_and_changes_nothing_else() -> None:
    step, state = started(setting(spike="skip", spike_factor=3.0))
    state, values = step(state, batch(hard=True))  # the first losses are what later ones are compared with
    assert not values["spike"]
    for _ in range(WINDOW):
        state, values = step(state, batch())
        assert not values["spike"]
    before = copy(state)
    state, values = step(state, batch(hard=True))
    after = copy(state)
    assert values["spike"]
    assert float(values["loss"]) > 3 * float(values["median"]) > 0
    for part in ("params", "stats", "opt_state"):
        assert same(getattr(before, part), getattr(after, part)), part
    assert (int(after.step), int(after.spikes.skipped), bool(after.diverged)) == (int(before.step) + 1, 1, False)
    assert np.array_equal(after.spikes.losses, before.spikes.losses)
    state, values = step(state, batch())
    assert not values["spike"]
    assert not same(after.params, state.params)
    assert step._cache_size() == 1


def test_a_spike_stops_before_its_update() -> None:
    step, state = started(setting(spike="stop", spike_factor=3.0))
    for _ in range(WINDOW):
        state, _ = step(state, batch())
    before = copy(state)
    state, values = step(state, batch(hard=True))
    assert values["spike"]
    assert values["finite"]
    assert bool(state.diverged)
    for part in ("params", "stats", "opt_state", "step", "spikes"):
        assert same(getattr(before, part), getattr(state, part)), part


def test_only_so_many_batches_are_skipped_in_a_row() -> None:
    step, state = started(setting(spike="skip", spike_factor=3.0))
    for _ in range(WINDOW):
        state, _ = step(state, batch())
    for _ in range(MOST_IN_ROW):
        state, _ = step(state, batch(hard=True))
        assert not bool(state.diverged)
    state, _ = step(state, batch(hard=True))
    assert bool(state.diverged)


MANY = 36
"""Steps until some of these small losses count as spikes."""

SKIPPING = (
    *("--train.spike", "skip", "--train.spike-window", str(WINDOW), "--train.spike-factor", "1.05"),
    *("--train.steps", str(MANY)),
)


def test_skipped_batches_are_written_with_their_samples_and_a_resumed_run_writes_the_same(place: Place) -> None:
    calm, cut = place.path / "skipping", place.path / "skipping-cut"
    assert place.train(*SKIPPING, workdir=calm).returncode == 0
    skipped = json.loads((calm / "skipped.json").read_text())
    assert skipped
    for entry in skipped:
        assert entry["loss"] > 1.05 * entry["median"]
        assert all((place.path / "data" / sample).is_file() for sample in entry["samples"])
    counts = {line["step"]: line["train/skipped"] for line in lines_of(calm) if "train/skipped" in line}
    assert all(count == sum(e["step"] <= step for e in skipped) for step, count in counts.items())
    state = state_of(calm / "checkpoints" / str(MANY))
    assert int(state["spikes"]["skipped"]) == len(skipped)

    shutil.copytree(calm, cut)  # back to the checkpoint before the last, with everything written since still there
    shutil.rmtree(cut / "checkpoints" / str(MANY))
    assert place.train(*SKIPPING, workdir=cut).returncode == 0
    assert json.loads((cut / "skipped.json").read_text()) == skipped
    assert_same_run(cut, calm, MANY)


@pytest.mark.stress
def test_a_run_that_stops_at_a_spike_says_which_samples_and_keeps_the_state_before(place: Place) -> None:
    run = place.path / "spiked"
    options = ("--train.spike", "stop", "--train.spike-window", str(WINDOW), "--train.spike-factor", "1.1")
    result = place.train(*options, workdir=run)
    assert result.returncode == 1
    report = json.loads((run / "spike.json").read_text())
    assert f"the loss of step {report['step']} is" in result.stderr
    assert len(report["samples"]) == 2
    assert report["loss"] > 1.1 * report["median"]
    assert (run / "checkpoints" / str(report["step"] - 1)).is_dir()


@pytest.mark.parametrize("name", ["spike_factor", "spike_window"])
def test_a_threshold_without_meaning_is_refused(name: str) -> None:
    with pytest.raises(Exception, match=f"train.{name}"):
        config_io.from_dict({"train": {name: 0}}, "test")
