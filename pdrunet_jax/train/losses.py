"""Binary and multi-class losses on logits, without ignored pixels.

All take logits (N, H, W, K), a target and `valid` (N, H, W), bool. With K = 1 the target is the probability of the
foreground, float (N, H, W) in [0, 1]; with K >= 2 it is the class index, int (N, H, W). Overlapping classes have a
sigmoid each: target and `valid` are (N, H, W, K) then, and weights are one a class, without background, or two a class,
outside and inside it. All return a scalar in the dtype of the logits.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from pdrunet_jax.config import LossConfig
from pdrunet_jax.runtime.errors import UserError

Loss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""loss(logits, target, valid) -> scalar."""


def make_loss(config: LossConfig, outputs: int, *, multilabel: bool = False) -> Loss:
    """Build the loss that `config` names, for `outputs` logits a pixel, of classes that overlap with `multilabel`.

    `config.class_weights` are numbers; `class_weights.balance` turns "balanced" into some.

    Raises:
        UserError: the loss or its class weights do not fit the number of outputs.
    """
    binary = outputs == 1 or multilabel
    name = config.name or ("bce_dice" if binary else "ce_dice")
    allowed = ("bce", "dice", "bce_dice", "focal", "tversky") if binary else ("ce", "dice", "ce_dice", "tversky")
    if name not in allowed:
        setting = "data.multilabel = true" if multilabel else f"model.outputs = {outputs}"
        raise UserError(f"loss.name = {name} does not fit {setting}; with that it is one of {', '.join(allowed)}")
    classes = outputs if multilabel else max(outputs, 2)
    weights = regions = _numbers(config) or (1.0,) * classes
    if multilabel and len(weights) == 2 * classes:  # they weigh pixels; a class as a whole has none
        regions = (1.0,) * classes
    elif len(weights) != classes:
        needs = (
            f"data.multilabel needs {classes}, one a class, or {2 * classes}, two a class"
            if multilabel
            else (f"model.outputs = {outputs} needs {classes}, background first")
        )
        raise UserError(f"loss.class_weights has {len(weights)} numbers; {needs}")

    entropy = partial(cross_entropy, weights=weights)
    dice = partial(soft_tversky, weights=regions, alpha=0.5, smooth=config.smooth)

    def both(logits: jax.Array, target: jax.Array, valid: jax.Array) -> jax.Array:
        share = config.dice_weight
        return share * dice(logits, target, valid) + (1 - share) * entropy(logits, target, valid)

    losses: dict[str, Loss] = {
        "bce": entropy,
        "ce": entropy,
        "dice": dice,
        "bce_dice": both,
        "ce_dice": both,
        "focal": partial(focal_loss, weights=weights, gamma=config.focal_gamma),
        "tversky": partial(soft_tversky, weights=regions, alpha=config.tversky_alpha, smooth=config.smooth),
    }
    return losses[name]


def _numbers(config: LossConfig) -> tuple[float, ...]:
    if config.class_weights == "balanced":
        raise ValueError("balanced class weights depend on the data: see class_weights.balance")
    return config.class_weights


def cross_entropy(logits: jax.Array, target: jax.Array, valid: jax.Array, weights: tuple[float, ...]) -> jax.Array:
    """Weighted cross-entropy, averaged over valid pixels with their weights (as in torch's `weight=`).

    K = 1: torch's binary_cross_entropy_with_logits for equal weights; `weights` is (background, foreground).
    K >= 2: torch's cross_entropy with `weight` and `ignore_index`. Overlapping classes: the first, over all classes.
    """
    if target.ndim == logits.ndim:
        pixel = _binary_cross_entropy(logits, target)
        weight = _by_class(weights, target)
    elif logits.shape[-1] == 1:
        pixel = _binary_cross_entropy(logits[..., 0], target)
        weight = weights[1] * target + weights[0] * (1 - target)
    else:
        index = jnp.where(valid, target, 0)
        pixel = -jnp.take_along_axis(jax.nn.log_softmax(logits), index[..., None], -1)[..., 0]
        weight = jnp.asarray(weights, logits.dtype)[index]
    return _mean(pixel * weight, valid, weight)


def focal_loss(
    logits: jax.Array, target: jax.Array, valid: jax.Array, weights: tuple[float, ...], *, gamma: float
) -> jax.Array:
    """Focal loss for one output or overlapping classes: mean of w (1 - p_t)^gamma CE (Lin et al., 2017, equation 5)."""
    overlap = target.ndim == logits.ndim
    logit = logits if overlap else logits[..., 0]
    p = jax.nn.sigmoid(logit)
    missing = p * (1 - target) + (1 - p) * target
    weight = _by_class(weights, target) if overlap else weights[1] * target + weights[0] * (1 - target)
    # The power's gradient at 0 is infinite below gamma = 1; the smallest normal number keeps it finite.
    modulation = jnp.maximum(missing, jnp.finfo(logit.dtype).tiny) ** gamma if gamma else 1.0
    return _mean(weight * modulation * _binary_cross_entropy(logit, target), valid)


def soft_tversky(
    logits: jax.Array, target: jax.Array, valid: jax.Array, weights: tuple[float, ...], *, alpha: float, smooth: float
) -> jax.Array:
    """1 - the soft Tversky index, per image and foreground class, then averaged with `weights`.

    index = (TP + s/2) / (TP + alpha FP + (1 - alpha) FN + s/2) with TP, FP and FN summed over probabilities (Salehi et
    al., 2017, equation 3); alpha = 1/2 makes it soft Dice, (2 TP + s) / (2 TP + FP + FN + s). Background counts in
    cross-entropy, not here.
    """
    if overlap := target.ndim == logits.ndim:
        p, t = jax.nn.sigmoid(logits), target
    elif logits.shape[-1] == 1:
        p, t = jax.nn.sigmoid(logits), target[..., None].astype(logits.dtype)
    else:
        p = jax.nn.softmax(logits)[..., 1:]
        t = jax.nn.one_hot(jnp.where(valid, target, 0), logits.shape[-1], dtype=logits.dtype)[..., 1:]
    weight = weights if overlap else weights[1:]
    weight = weight if sum(weight) else (1.0,) * len(weight)
    inside = (valid if overlap else valid[..., None]).astype(logits.dtype)
    true = (p * t * inside).sum((1, 2))
    false_positive = (p * (1 - t) * inside).sum((1, 2))
    false_negative = ((1 - p) * t * inside).sum((1, 2))
    index = (true + smooth / 2) / (true + alpha * false_positive + (1 - alpha) * false_negative + smooth / 2)
    share = jnp.asarray(weight, logits.dtype) / sum(weight)
    return 1 - (index.mean(0) * share).sum()


def _by_class(weights: tuple[float, ...], target: jax.Array) -> jax.Array:
    """`weights`, one or two a class, for each element of a target (N, H, W, K) of overlapping classes."""
    table = jnp.asarray(weights, target.dtype)
    if table.size == target.shape[-1]:
        return jnp.broadcast_to(table, target.shape)
    outside, inside = (jnp.broadcast_to(each, target.shape) for each in (table[::2], table[1::2]))
    return inside * target + outside * (1 - target)


def _binary_cross_entropy(logit: jax.Array, target: jax.Array) -> jax.Array:
    """-t log(sigmoid(x)) - (1 - t) log(1 - sigmoid(x)) for each pixel, without overflow."""
    return jnp.maximum(logit, 0) - logit * target + jnp.log1p(jnp.exp(-jnp.abs(logit)))


def _mean(values: jax.Array, valid: jax.Array, weight: jax.Array | None = None) -> jax.Array:
    """Mean of `values` over valid pixels, or their sum over the sum of `weight`; 0 if there are none."""
    total = jnp.where(valid, values, 0).sum()
    count = jnp.where(valid, 1 if weight is None else weight, 0).sum().astype(values.dtype)
    return jnp.where(count > 0, total / jnp.where(count > 0, count, 1), 0)
