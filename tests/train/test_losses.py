import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdrunet_jax.config import LossConfig
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.train.losses import make_loss

BINARY = ("bce", "dice", "bce_dice", "focal", "tversky")
CLASSES = ("ce", "dice", "ce_dice", "tversky")
ALL = [(name, 1) for name in BINARY] + [(name, 3) for name in CLASSES]


def case(outputs: int, batch: int = 2) -> tuple[jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(outputs), 3)
    logits = jax.random.normal(keys[0], (batch, 6, 5, outputs))
    target = jax.random.randint(keys[1], (batch, 6, 5), 0, max(outputs, 2))
    valid = jax.random.bernoulli(keys[2], 0.8, (batch, 6, 5))
    return logits, target.astype(float) if outputs == 1 else target, valid


@pytest.mark.parametrize(("name", "outputs"), ALL)
def test_ignored_pixels_have_no_part(name: str, outputs: int) -> None:
    logits, target, valid = case(outputs)
    loss = jax.jit(make_loss(LossConfig(name=name), outputs))
    elsewhere = ~valid[..., None]
    changed = jnp.where(elsewhere, 9.0, logits)
    other = jnp.where(valid, target, 0)
    assert float(loss(logits, target, valid)) == pytest.approx(float(loss(changed, other, valid)), rel=1e-6)
    gradient = jax.jit(jax.grad(loss))(logits, target, valid)
    assert float(jnp.abs(jnp.where(elsewhere, gradient, 0)).max()) == 0
    assert float(jnp.abs(gradient).max()) > 0


@pytest.mark.parametrize(("name", "outputs"), ALL)
def test_a_perfect_prediction_costs_next_to_nothing(name: str, outputs: int) -> None:
    _, target, valid = case(outputs)
    logits = 30 * (2 * target[..., None] - 1) if outputs == 1 else 60.0 * jax.nn.one_hot(target, outputs)
    assert float(make_loss(LossConfig(name=name), outputs)(logits, target, valid)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("name", "outputs"), ALL)
def test_empty_masks_and_nothing_valid_stay_finite(name: str, outputs: int) -> None:
    logits, target, valid = case(outputs)
    loss = jax.jit(jax.value_and_grad(make_loss(LossConfig(name=name), outputs)))
    for mask, inside in ((target * 0, valid), (target, valid & False)):
        value, gradient = loss(logits * 50, mask, inside)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()


def test_extreme_logits_do_not_overflow() -> None:
    logits = jnp.array([-1e4, 1e4]).reshape(1, 1, 2, 1)
    target, valid = jnp.array([[[1.0, 0.0]]]), jnp.ones((1, 1, 2), bool)
    for name in BINARY:
        assert np.isfinite(make_loss(LossConfig(name=name), 1)(logits, target, valid))


def test_soft_dice_is_its_formula() -> None:
    logits, target, valid = case(1, batch=1)
    p, t = jax.nn.sigmoid(logits[..., 0])[valid], target[valid]
    expected = 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
    assert float(make_loss(LossConfig(name="dice"), 1)(logits, target, valid)) == pytest.approx(float(expected))


def test_focal_loss_without_focus_is_cross_entropy() -> None:
    logits, target, valid = case(1)
    focal, bce = make_loss(LossConfig(name="focal", focal_gamma=0), 1), make_loss(LossConfig(name="bce"), 1)
    assert float(focal(logits, target, valid)) == pytest.approx(float(bce(logits, target, valid)))


def test_bce_takes_soft_targets() -> None:
    logits = jnp.zeros((1, 1, 1, 1))
    value = make_loss(LossConfig(name="bce"), 1)(logits, jnp.full((1, 1, 1), 0.3), jnp.ones((1, 1, 1), bool))
    assert float(value) == pytest.approx(np.log(2))


def test_a_higher_weight_makes_its_class_count_more() -> None:
    logits, target, valid = case(3)
    wrong = jnp.where((target == 2)[..., None], jnp.array([5.0, 0, -5]).reshape(1, 1, 1, 3), logits)
    even = make_loss(LossConfig(name="ce"), 3)(wrong, target, valid)
    uneven = make_loss(LossConfig(name="ce", class_weights=(1, 1, 10)), 3)(wrong, target, valid)
    assert uneven > even


@pytest.mark.parametrize(("name", "outputs"), [("ce", 1), ("bce", 2), ("focal", 3)])
def test_a_loss_that_does_not_fit_the_outputs_names_those_that_do(name: str, outputs: int) -> None:
    with pytest.raises(UserError, match=r"loss\.name = .* it is one of"):
        make_loss(LossConfig(name=name), outputs)


def test_class_weights_of_the_wrong_length_are_refused() -> None:
    with pytest.raises(UserError, match="needs 3, background first"):
        make_loss(LossConfig(class_weights=(1, 2)), 3)
