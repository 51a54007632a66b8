"""Optimizers and learning-rate schedules, every hyperparameter explicit, with PyTorch's semantics."""

import optax

from pdrunet_jax.config import OptimConfig

WARMUP_SHARE = 0.3
"""Share of a one-cycle run in which the learning rate rises, as in torch's OneCycleLR."""

ONECYCLE_START = 25.0
"""One-cycle starts at the peak divided by this."""

ONECYCLE_END = 1e4
"""One-cycle ends at its start divided by this."""


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """The learning rate as a function of the update's number, 0 to `steps` - 1."""
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    if config.schedule == "onecycle":
        return optax.cosine_onecycle_schedule(
            steps, peak, pct_start=WARMUP_SHARE, div_factor=ONECYCLE_START, final_div_factor=ONECYCLE_END
        )
    rest = steps - config.warmup_steps
    if config.schedule == "constant":
        main = optax.constant_schedule(peak)
    elif config.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction)
    else:
        main = optax.polynomial_schedule(peak, final, config.power, rest)
    if not config.warmup_steps:
        return main
    # The first update already moves: step k of the warm-up has (k + 1) / warmup_steps of the peak.
    first = peak / config.warmup_steps
    rise = optax.linear_schedule(first, peak, max(config.warmup_steps - 1, 1))
    return optax.join_schedules([rise, main], [config.warmup_steps])


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer that `config` describes, over `steps` updates.

    adam and sgd add weight_decay * parameter to the gradient, as torch's do; adamw decays parameters on their own.
    """
    schedule = make_schedule(config, steps)
    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
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
