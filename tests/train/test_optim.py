import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pdrunet_jax.config import OptimConfig, from_dict
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.train.optim import make_optimizer, make_schedule


def rates(steps: int = 100, **settings) -> np.ndarray:
    schedule = make_schedule(OptimConfig(learning_rate=1.0, **settings), steps)
    return np.array([float(schedule(step)) for step in range(steps + 1)])


def test_the_constant_schedule_is_constant() -> None:
    assert (rates() == 1).all()


def test_warm_up_rises_linearly_to_the_peak_and_moves_from_the_first_step() -> None:
    np.testing.assert_allclose(rates(warmup_steps=4)[:6], [0.25, 0.5, 0.75, 1, 1, 1], rtol=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "polynomial"])
def test_decay_starts_at_the_peak_and_ends_at_the_final_share(schedule: str) -> None:
    values = rates(schedule=schedule, final_fraction=0.1, warmup_steps=10)
    assert values[10] == pytest.approx(1)
    assert values[-1] == pytest.approx(0.1, rel=1e-5)
    assert (np.diff(values[10:]) < 1e-7).all()


def test_one_cycle_peaks_after_three_tenths() -> None:
    values = rates(schedule="onecycle")
    assert values.argmax() == 29  # the 30th update
    assert values[0] == pytest.approx(1 / 25, rel=1e-5)
    assert values[99] == values[100] == pytest.approx(1 / 25 / 1e4, rel=1e-2)


def test_a_restart_begins_a_schedule_of_its_own_and_changes_nothing_before() -> None:
    settings = {"schedule": "cosine", "warmup_steps": 5}
    whole = rates(100, restarts=(30, 70), **settings)
    parts = [rates(steps, **settings)[:steps] for steps in (30, 40, 30)]
    np.testing.assert_array_equal(whole[:100], np.concatenate(parts))
    for restarts in ((70, 30), (30, 30), (100,), (97,), (4,)):
        with pytest.raises(UserError, match=r"optim\.restarts = .* must rise, be less than train\.steps = 100"):
            from_dict({"train": {"steps": 100}, "optim": {**settings, "restarts": restarts}}, "test")


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_every_optimizer_finds_the_bottom_of_a_bowl(name: str) -> None:
    optimizer = make_optimizer(OptimConfig(name=name, learning_rate=0.05), 300)
    x = jnp.array([3.0, -2.0])
    state = optimizer.init(x)
    for _ in range(300):
        updates, state = optimizer.update(2 * x, state, x)
        x = optax.apply_updates(x, updates)
    assert float(jnp.abs(x).max()) < 0.05


def first_update(**settings) -> np.ndarray:
    optimizer = make_optimizer(OptimConfig(learning_rate=1.0, **settings), 10)
    x = jnp.array([4.0])
    return np.asarray(optimizer.update(jnp.array([10.0]), optimizer.init(x), x)[0])


def test_clipping_bounds_the_gradient_that_sgd_sees() -> None:
    assert first_update(name="sgd", momentum=0, clip_norm=2)[0] == pytest.approx(-2)


def test_decay_is_coupled_in_sgd_and_decoupled_in_adamw() -> None:
    assert first_update(name="sgd", momentum=0, weight_decay=0.5)[0] == pytest.approx(-12)
    assert first_update(name="adamw", weight_decay=0.5)[0] == pytest.approx(-1 - 2, rel=1e-5)
    assert first_update(name="adam", weight_decay=0.5)[0] == pytest.approx(-1, rel=1e-5)


def test_nesterov_looks_ahead() -> None:
    assert first_update(name="sgd", nesterov=True)[0] == pytest.approx(-19)
    assert first_update(name="sgd", nesterov=False)[0] == pytest.approx(-10)
