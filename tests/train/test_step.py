import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdrunet_jax import config as config_io
from pdrunet_jax.model.pixels import unit_range
from pdrunet_jax.train.step import build_model, create_state, make_eval_step, make_train_step

SMALL = {
    "model": {"name": "unet", "depth": 1, "filters": 2, "dropout": 0.0},
    "train": {"steps": 10},
    "optim": {"learning_rate": 0.01},
}


def setting(**sections: dict[str, Any]) -> Any:
    merged = {name: SMALL.get(name, {}) | sections.get(name, {}) for name in {*SMALL, *sections}}
    return config_io.from_dict(merged, "test")


def batch(count: int = 4, classes: int = 1, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    mask = random.integers(0, classes + 1, (count, 32, 32), dtype=np.uint8)
    mask[:, :2] = 255
    return {
        "image": random.integers(0, 256, (count, 32, 32, 1), dtype=np.uint8),
        "mask": mask,
        "index": np.arange(count, dtype=np.int32),
        "epoch": np.zeros(count, np.int32),
    }


def start(config: Any, outputs: int = 1) -> tuple[Any, Any, Any]:
    graphdef, state = create_state(config, build_model(config, outputs))
    return make_train_step(config, graphdef, outputs), make_eval_step(config, graphdef, outputs), state


def same(one: Any, two: Any) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda a, b: np.array_equal(a, b), one, two)))


def copy(tree: Any) -> Any:
    return jax.tree.map(np.array, tree)  # the step takes the buffers of its argument for its result


@pytest.mark.parametrize("outputs", [1, 3])
def test_training_lowers_the_loss(outputs: int) -> None:
    step, _, state = start(setting(), outputs)
    data = batch(classes=max(outputs - 1, 1))
    losses = []
    for _ in range(8):
        state, values = step(state, data)
        losses.append(float(values["loss"]))
    assert losses[-1] < losses[0]
    assert int(state.step) == 8
    assert set(values) == {"loss", "dice", "grad_norm", "learning_rate", "diverged"}
    assert 0 <= values["dice"] <= 1


def test_the_same_seed_gives_the_same_state_bit_for_bit_and_another_does_not() -> None:
    config = setting(model={"dropout": 0.3}, augment={"flip_horizontal": 0.5, "noise": 0.1})
    other = dataclasses.replace(config, seed=1)
    ends = []
    for each in (config, config, other):
        step, _, state = start(each)
        for number in range(2):
            state, _ = step(state, batch(seed=number))
        ends.append(copy(state))
    assert same(ends[0], ends[1])
    assert not same(ends[0].params, ends[2].params)


def test_a_loss_that_is_not_finite_changes_nothing_from_then_on() -> None:
    step, _, state = start(setting())
    state, _ = step(state, batch())
    # One parameter at infinity makes the loss NaN; everything else has to stay as it was.
    params = jax.tree.map(lambda p: p, state.params)
    params["final_conv"]["bias"] = jax.tree.map(lambda p: p * jnp.inf, params["final_conv"]["bias"])
    state = dataclasses.replace(state, params=params)
    before = copy(state)
    state, values = step(state, batch())
    assert values["diverged"]
    assert bool(state.diverged)
    state, _ = step(state, batch(seed=1))
    after = copy(state)
    assert int(after.step) == 1
    for field in ("params", "stats", "opt_state", "step"):
        assert same(getattr(before, field), getattr(after, field)), field


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    # Without normalisation the images of a batch do not meet, so that both ways compute the same mean.
    sections = {"model": {"norm": "none"}, "loss": {"name": "dice"}, "optim": {"name": "sgd", "momentum": 0.0}}
    ends = []
    for parts in (1, 2):
        step, _, state = start(setting(**{**sections, "optim": sections["optim"] | {"accumulate": parts}}))
        state, values = step(state, batch())
        ends.append((copy(state.params), float(values["loss"]), float(values["dice"])))
    assert ends[0][1:] == pytest.approx(ends[1][1:], rel=1e-5)
    for one, two in zip(*(jax.tree.leaves(params) for params, *_ in ends), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)


def test_the_moving_averages_follow_parameters_and_running_statistics() -> None:
    step, _, state = start(setting(optim={"ema": 0.5}))
    first = copy([state.params, state.stats])
    state, _ = step(state, batch())
    latest = [state.params, state.stats]
    expected = jax.tree.map(lambda a, b: 0.5 * a + 0.5 * np.array(b) if a.dtype == np.float32 else b, first, latest)
    for one, two in zip(jax.tree.leaves(expected), jax.tree.leaves(list(state.weights)), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-7)
    _, _, state = start(setting())
    assert state.weights == (state.params, state.stats)


def test_validation_scores_each_image_on_its_own() -> None:
    _, evaluate, state = start(setting())
    data = batch()
    whole = evaluate(state.params, state.stats, {"image": data["image"], "mask": data["mask"]})
    for row in range(4):
        part = {
            "image": np.repeat(data["image"][row : row + 1], 4, 0),
            "mask": np.repeat(data["mask"][row : row + 1], 4, 0),
        }
        alone = evaluate(state.params, state.stats, part)
        assert float(whole["loss"][row]) == pytest.approx(float(alone["loss"][0]), rel=1e-5)
        assert int(whole["tp"][row, 0]) == int(alone["tp"][0, 0])
    pixels = whole["tp"] + whole["fp"] + whole["fn"] + whole["tn"]
    assert (np.asarray(pixels) == 30 * 32).all()  # two rows of each mask are to be ignored


def test_a_step_compiles_once(caplog: pytest.LogCaptureFixture) -> None:
    step, _, state = start(setting())
    batches = [batch(seed=number) for number in range(3)]
    with jax.log_compiles():
        for each in batches:
            state, _ = step(state, each)
    assert sum("Compiling jit(train_step)" in message for message in caplog.messages) == 1


def test_soft_masks_are_trained_on_unrounded() -> None:
    data = batch() | {"mask": np.full((4, 32, 32), 77, np.uint8)}
    step, _, state = start(setting(data={"soft_masks": True}, loss={"name": "bce"}, optim={"learning_rate": 0.1}))
    for _ in range(9):
        state, values = step(state, data)
    p = 77 / 255
    entropy = -p * np.log(p) - (1 - p) * np.log(1 - p)
    assert entropy < float(values["loss"]) < entropy + 0.3


def test_bfloat16_keeps_parameters_statistics_and_loss_in_float32() -> None:
    step, _, state = start(setting(train={"precision": "bfloat16"}))
    state, values = step(state, batch())
    kinds = {leaf.dtype.name for leaf in jax.tree.leaves((state.params, state.stats, values["loss"]))}
    assert kinds == {"float32", "int32"}


@pytest.mark.optimised
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scaling_is_a_correctly_rounded_division_when_compiled(dtype: str) -> None:
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    expected = values.astype(jnp.dtype(dtype)) / np.asarray(255, jnp.dtype(dtype))
    assert np.array_equal(jax.jit(lambda x: unit_range(x, dtype))(values), expected)
