"""The training state and the two compiled steps: state in, state out.

`make_train_step` and `make_eval_step` return functions of arrays alone; nothing outside their arguments changes.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from pdrunet_jax.config import Config
from pdrunet_jax.data.augment import augment, sample_keys
from pdrunet_jax.data.masks import IGNORE
from pdrunet_jax.evaluate import metrics
from pdrunet_jax.model.network import PDRUNet
from pdrunet_jax.model.pixels import predict_classes, unit_range
from pdrunet_jax.runtime.compile import jit
from pdrunet_jax.runtime.devices import batch_sharding, replicated
from pdrunet_jax.train.losses import Loss, make_loss
from pdrunet_jax.train.optim import make_optimizer, make_schedule

Batch = Mapping[str, Any]
Metrics = dict[str, jax.Array]

MOST_IN_ROW = 10
"""Batches that may be skipped one after the other. The weights do not change meanwhile, so it is they that are bad."""

# Streams of random numbers that one seed gives rise to.
_INIT, _AUGMENT, _DROPOUT = range(3)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a training step changes.

    Attributes:
        params: parameters by path.
        stats: BatchNorm's running statistics by path.
        opt_state: optax's state.
        ema: moving average of the parameters, or None.
        step: updates done, int32.
        halted: a loss or gradient was not finite, or spiked; from then on no step changes anything.
        spikes: what a loss is compared with to be called a spike, or None where `train.spike` is off.
    """

    params: Any
    stats: Any
    opt_state: Any
    ema: Any
    step: jax.Array
    diverged: jax.Array
    spikes: "Spikes | None" = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spikes:
    """The losses of the last updates; zeros throughout before the first.

    Attributes:
        losses: float32 (train.spike_window,), the newest last.
        filled: how many of them there are yet, int32.
        skipped: batches without an update, int32.
        in_row: those since the last update, int32.
    """

    losses: jax.Array
    filled: jax.Array
    skipped: jax.Array
    in_row: jax.Array


def random_stream(seed: int, stream: int) -> jax.Array:
    """The key of one of the independent streams of random numbers of a run."""
    return jax.random.fold_in(jax.random.key(seed), stream)


def dropout_key(seed: int, step: int | jax.Array) -> jax.Array:
    """The key that the dropouts of a step draw from; `step` counts the updates before it."""
    return jax.random.fold_in(random_stream(seed, _DROPOUT), step)


def build_model(config: Config, outputs: int, mesh: Mesh | None = None) -> PDRUNet:
    """The network of `config`, on a mesh or not, with its initial weights, drawn from `config.seed`."""
    wide = jnp.float64 if config.train.precision == "float64" else jnp.float32
    return PDRUNet(
        in_channels=config.model.in_channels,
        outputs=outputs,
        filters=config.model.filters,
        shortcut=config.model.shortcut,
        norm=config.model.norm,
        dropout=config.model.dropout,
        conv=config.model.conv,
        remat=config.train.remat,
        init=config.model.init,
        dtype=jnp.bfloat16 if config.train.precision == "bfloat16" else wide,
        param_dtype=wide,
        mesh=mesh,
        rngs=nnx.Rngs(params=random_stream(config.seed, _INIT)),
    )


def create_state(config: Config, model: PDRUNet) -> tuple[Any, TrainState]:
    """Split `model` into its static part (a graph definition) and the state that training starts from."""
    parts: Any = nnx.split(model, nnx.Param, nnx.BatchStat)
    graphdef, params, stats = parts
    state = TrainState(
        params=params,
        stats=stats,
        opt_state=make_optimizer(config.optim, config.train.steps).init(params),
        # A copy, because the step donates its buffers and none may be donated twice.
        ema=jax.tree.map(jnp.copy, params) if config.optim.ema else None,
        step=jnp.zeros((), jnp.int32),
        diverged=jnp.zeros((), bool),
        spikes=_no_losses(config.train.spike_window) if config.train.spike != "off" else None,
    )
    return graphdef, state


def _no_losses(window: int) -> Spikes:
    zeros = (jnp.zeros((), jnp.int32) for _ in range(3))
    return Spikes(jnp.zeros(window, jnp.float32), *zeros)


def targets(mask: jax.Array, *, outputs: int, soft: bool, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """What losses compare with, from a uint8 mask (N, H, W) of class indices, or of grey values if `soft`.

    Returns:
        target (N, H, W), the foreground's probability for one output, else the class index, int32; valid (N, H, W),
        bool, false where the mask is to be ignored.
    """
    if soft:
        return unit_range(mask, dtype), jnp.ones(mask.shape, bool)
    valid = mask != IGNORE
    return ((mask == 1).astype(dtype) if outputs == 1 else mask.astype(jnp.int32)), valid


def make_train_step(
    config: Config, graphdef: Any, outputs: int, mesh: Mesh | None = None
) -> Callable[[TrainState, Batch], Any]:
    """The compiled training step: (state, batch) -> (state, metrics). The state's buffers are donated.

    The batch holds `image` uint8 (N, H, W, C), `mask` uint8 (N, H, W), `index` and `epoch` int32 (N,). Metrics are
    scalars: loss, dice (mean over images and classes), grad_norm, learning_rate, finite, halted; and unless
    `train.spike` is off, spike and median. An update whose loss or gradient is not finite is not made; the state then
    counts as halted and stays as it was before. Nor is one whose loss is a spike: with "stop" it halts likewise, with
    "skip" only the step is counted, until `MOST_IN_ROW`.

    `mesh` is that of the model, or None. On a mesh the state and the metrics are on every device, and the batch comes
    from `pdrunet_jax.mesh.place_batch`.
    """
    where = {} if mesh is None else {"out_shardings": replicated(mesh)}
    return jit(partial(train_step, config, graphdef, outputs), donate_argnums=0, **where)


def train_step(
    config: Config, graphdef: Any, outputs: int, state: TrainState, batch: Batch
) -> tuple[TrainState, Metrics]:
    """One update, not compiled: what `make_train_step` compiles, with its static arguments first."""
    loss_function = make_loss(config.loss, outputs)
    soft = config.data.soft_masks
    dtype = jnp.float64 if config.train.precision == "float64" else jnp.float32
    keys = sample_keys(random_stream(config.seed, _AUGMENT), batch["epoch"], batch["index"])
    images, mask = augment(unit_range(batch["image"], dtype), batch["mask"], keys, config.augment, soft=soft)
    target, valid = targets(mask, outputs=outputs, soft=soft, dtype=dtype)
    key = dropout_key(config.seed, state.step)

    loss, logits, gradients, stats = accumulate(
        graphdef,
        loss_function,
        state.params,
        state.stats,
        (images, target, valid),
        key,
        config.optim.accumulate,
    )
    updates, opt_state = make_optimizer(config.optim, config.train.steps).update(
        gradients, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
    ema = None if state.ema is None else optax.incremental_update(params, state.ema, 1 - config.optim.ema)

    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    diverged = ~finite | state.diverged
    spike, spikes, about = jnp.zeros((), bool), state.spikes, {}
    if state.spikes is not None:
        median = jnp.median(state.spikes.losses)
        full = state.spikes.filled == config.train.spike_window
        spike = full & (loss > config.train.spike_factor * median)
        diverged |= spike & ((config.train.spike == "stop") | (state.spikes.in_row >= MOST_IN_ROW))
        spikes = _counted(state.spikes, loss, spike, diverged)
        about = {"spike": spike, "median": median}
    after, before = (params, stats, opt_state, ema), (state.params, state.stats, state.opt_state, state.ema)
    kept: Any = jax.tree.map(lambda a, b: jnp.where(diverged | spike, b, a), after, before)
    params, stats, opt_state, ema = kept
    truth = jnp.round(target).astype(jnp.int32)
    counts = metrics.confusion(predict_classes(logits), truth, valid, max(outputs - 1, 1))
    updates_done = state.step if state.spikes is None else state.step - state.spikes.skipped
    step = jnp.where(diverged, state.step, state.step + 1)
    return TrainState(params, stats, opt_state, ema, step, diverged, spikes), {
        "loss": loss,
        "dice": metrics.dice(counts).mean(),
        "grad_norm": norm,
        "learning_rate": jnp.asarray(make_schedule(config.optim, config.train.steps)(updates_done)),
        "finite": finite,
        "diverged": diverged,
        **about,
    }


def _counted(spikes: Spikes, loss: jax.Array, spike: jax.Array, diverged: jax.Array) -> Spikes:
    """`spikes` after a step with this `loss`: as they were if the run halted, else with an update or a skip more."""
    updated = Spikes(
        jnp.roll(spikes.losses, -1).at[-1].set(loss.astype(jnp.float32)),
        jnp.minimum(spikes.filled + 1, spikes.losses.size),
        spikes.skipped,
        jnp.zeros_like(spikes.in_row),
    )
    skipped = dataclasses.replace(spikes, skipped=spikes.skipped + 1, in_row=spikes.in_row + 1)
    kept: Spikes = jax.tree.map(
        lambda old, skip, new: jnp.where(diverged, old, jnp.where(spike, skip, new)), spikes, skipped, updated
    )
    return kept


def accumulate(
    graphdef: Any,
    loss_function: Loss,
    params: Any,
    stats: Any,
    data: tuple[jax.Array, jax.Array, jax.Array],
    dropout_key: jax.Array,
    parts: int,
) -> tuple[jax.Array, jax.Array, Any, Any]:
    """Loss, logits, mean gradient and new statistics of a batch, taken in `parts` micro-batches one after the other.

    `data` is images (N, H, W, C) in [0, 1], and target and valid pixels as `targets` has them; `parts` must divide N.
    """

    def forward(params: Any, stats: Any, part: Any, key: jax.Array) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        images, target, valid = part
        model = nnx.merge(graphdef, params, stats, copy=True)
        logits = model(images, train=True, dropout_key=key)
        return loss_function(logits, target, valid), (logits, nnx.state(model, nnx.BatchStat))

    gradient = jax.value_and_grad(forward, has_aux=True)
    if parts == 1:
        (loss, (logits, stats)), gradients = gradient(params, stats, data, dropout_key)
        return loss, logits, gradients, stats

    def body(carry: Any, part: Any) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        stats, total = carry
        (loss, (logits, stats)), gradients = gradient(params, stats, part[0], part[1])
        return (stats, jax.tree.map(jnp.add, total, gradients)), (loss, logits)

    split = jax.tree.map(lambda x: x.reshape(parts, x.shape[0] // parts, *x.shape[1:]), data)
    zeros = jax.tree.map(jnp.zeros_like, params)
    (stats, total), (losses, logits) = jax.lax.scan(body, (stats, zeros), (split, jax.random.split(dropout_key, parts)))
    gradients = jax.tree.map(lambda g: g / parts, total)
    return losses.mean(), logits.reshape(-1, *logits.shape[2:]), gradients, stats


def make_eval_step(
    config: Config, graphdef: Any, outputs: int, mesh: Mesh | None = None
) -> Callable[[Any, Any, Batch], Metrics]:
    """The compiled validation step: (params, stats, batch) -> values for each image.

    `loss` (N,), each image's own; `tp`, `fp`, `fn`, `tn` (N, foreground classes); `prediction` (N, H, W), uint8 class
    indices. On a mesh (that of the model) all of them lie as the batch does.
    """
    where = {} if mesh is None else {"out_shardings": batch_sharding(mesh)}
    return jit(partial(_eval_step, config, graphdef, outputs), **where)


def _eval_step(config: Config, graphdef: Any, outputs: int, params: Any, stats: Any, batch: Batch) -> Metrics:
    soft = config.data.soft_masks
    dtype = jnp.float64 if config.train.precision == "float64" else jnp.float32
    target, valid = targets(batch["mask"], outputs=outputs, soft=soft, dtype=dtype)
    logits = nnx.merge(graphdef, params, stats, copy=True)(unit_range(batch["image"], dtype))
    loss_function = make_loss(config.loss, outputs)

    def one(logits: jax.Array, target: jax.Array, valid: jax.Array) -> jax.Array:
        return loss_function(logits[None], target[None], valid[None])

    prediction = predict_classes(logits)
    counts = metrics.confusion(prediction, jnp.round(target).astype(jnp.int32), valid, max(outputs - 1, 1))
    return {
        "loss": jax.vmap(one)(logits, target, valid),
        "prediction": prediction.astype(jnp.uint8),
        **counts._asdict(),
    }
