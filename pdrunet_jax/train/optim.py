"""Optimizers and learning-rate schedules, every hyperparameter explicit, with PyTorch's semantics."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from pdrunet_jax.config import OptimConfig

WARMUP_SHARE = 0.3
"""Fraction of a one-cycle run in which the learning rate rises, as in torch's OneCycleLR."""

ONECYCLE_START = 25.0
"""One-cycle starts at the peak divided by this."""

ONECYCLE_END = 1e4
"""One-cycle ends at its start divided by this."""


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate as a function of the number of the update, 0 to `steps` - 1."""
    starts = (0, *config.restarts, steps)
    parts = [_make_part(config, after - before) for before, after in pairwise(starts)]
    return optax.join_schedules(parts, list(config.restarts)) if config.restarts else parts[0]


def _make_part(config: OptimConfig, steps: int) -> optax.Schedule:
    """The schedule without restarts."""
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    if config.schedule == "onecycle":
        return one_cycle(steps, peak)
    rest = steps - config.warmup_steps
    if config.schedule == "constant":
        main = optax.constant_schedule(peak)
    elif config.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction)
    else:
        main = optax.polynomial_schedule(peak, final, config.power, rest)
    if not config.warmup_steps:
        return main
    # The first update already moves the weights: step k of the warm-up has (k + 1) / warmup_steps of the peak.
    first = peak / config.warmup_steps
    rise = optax.linear_schedule(first, peak, max(config.warmup_steps - 1, 1))
    return optax.join_schedules([rise, main], [config.warmup_steps])


def one_cycle(steps: int, peak: float) -> optax.Schedule:
    """OneCycleLR as in torch: half a cosine up to `peak`, reached before update 0.3 `steps` - 1, and one down.

    optax's own schedule reaches its peak and its end one update later.
    """
    start, end = peak / ONECYCLE_START, peak / ONECYCLE_START / ONECYCLE_END
    top, last = WARMUP_SHARE * steps - 1, steps - 1

    def half_cosine(first: float, second: float, share: jax.Array) -> jax.Array:
        return second + (first - second) / 2 * (1 + jnp.cos(jnp.pi * share))

    def rate(count: ArrayLike) -> jax.Array:
        count = jnp.asarray(count)
        down = half_cosine(peak, end, jnp.clip((count - top) / (last - top), 0, 1))
        return jnp.where(count <= top, half_cosine(start, peak, count / top), down)

    return rate


def clip_by_global_norm(largest: float) -> optax.GradientTransformation:
    """clip_grad_norm_ as in torch, which divides by the norm plus 1e-6; optax's own does not."""

    def clip(gradients: optax.Updates, _: optax.Params | None) -> optax.Updates:
        factor = jnp.minimum(largest / (optax.tree.norm(gradients) + 1e-6), 1.0)
        return jax.tree.map(lambda gradient: gradient * factor.astype(gradient.dtype), gradients)

    return optax.stateless(clip)


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Build the optimizer of `config` for `steps` updates.

    adam and sgd add weight_decay * parameter to the gradient, as torch's do; adamw decays parameters on their own.
    """
    schedule = make_schedule(config, steps)
    parts = [clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    if config.name != "adamw" and config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay))
    if config.name == "sgd":
        if config.momentum:
            parts.append(optax.trace(config.momentum, nesterov=config.nesterov))
    else:
        parts.append(optax.scale_by_adam(config.b1, config.b2, config.eps))
    if config.name == "adamw":
        parts.append(optax.add_decayed_weights(config.weight_decay))
    parts.append(optax.scale_by_learning_rate(schedule))
    return optax.chain(*parts)
