"""The training state, and the compiled training and validation steps: state in, state out.

The functions that `make_train_step` and `make_eval_step` return depend on their arguments alone.
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
from jax.typing import DTypeLike

from pdrunet_jax.config import Config
from pdrunet_jax.data.augment import augment, sample_keys
from pdrunet_jax.data.masks import PADDING
from pdrunet_jax.evaluate import metrics
from pdrunet_jax.model.base import Network
from pdrunet_jax.model.build import build
from pdrunet_jax.model.execution import Execution
from pdrunet_jax.model.layers import State, split_state
from pdrunet_jax.model.pixels import foreground_classes, predict_classes, unit_range
from pdrunet_jax.runtime.compile import jit
from pdrunet_jax.runtime.devices import batch_sharding, replicated
from pdrunet_jax.train.freeze import freeze_norms, join_params, split_params
from pdrunet_jax.train.losses import Loss, make_loss
from pdrunet_jax.train.optim import make_optimizer, make_schedule

Batch = Mapping[str, Any]
Metrics = dict[str, jax.Array]
Graph = nnx.GraphDef[Any]

# Independent streams of random numbers, all from one seed.
_INIT, _AUGMENT, _DROPOUT = range(3)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a training step changes.

    Attributes:
        params: parameters by path.
        stats: BatchNorm's running statistics by path.
        opt_state: optax's state, for the parameters that are not frozen.
        ema: exponential moving average of the parameters, or None.
        ema_stats: the average of the running statistics that goes with it, or None. Averaged parameters give other
            activations than the latest ones, whose statistics would not fit them.
        step: number of updates, int32.
        diverged: a loss or gradient was not finite; no later step changes anything.
    """

    params: State
    stats: State
    opt_state: optax.OptState
    ema: State | None
    ema_stats: State | None
    step: jax.Array
    diverged: jax.Array

    @property
    def weights(self) -> tuple[State, State]:
        """Parameters and running statistics to validate and to keep: the averages, if there are any."""
        if self.ema is None or self.ema_stats is None:
            return self.params, self.stats
        return self.ema, self.ema_stats


def random_stream(seed: int, stream: int) -> jax.Array:
    """The key of one of a run's independent streams of random numbers."""
    return jax.random.fold_in(jax.random.key(seed), stream)


def dropout_key(seed: int, step: int | jax.Array) -> jax.Array:
    """The key of a step's dropout masks; `step` is the number of updates before it."""
    return jax.random.fold_in(random_stream(seed, _DROPOUT), step)


def build_model(config: Config, outputs: int) -> Network:
    """Build the network of `config` with initial weights drawn from `config.seed`."""
    model = build(
        dataclasses.replace(config.model, outputs=outputs),
        dtype=jnp.bfloat16 if config.train.precision == "bfloat16" else _dtype(config),
        multilabel=config.data.multilabel,
        param_dtype=_dtype(config),
        rngs=nnx.Rngs(params=random_stream(config.seed, _INIT)),
    )
    freeze_norms(model, config.train.freeze)
    return model


def create_state(config: Config, model: Network) -> tuple[Graph, TrainState]:
    """Split `model` into its graph definition and the state that training starts from."""
    graphdef, params, stats = split_state(model)
    state = TrainState(
        params=params,
        stats=stats,
        opt_state=make_optimizer(config.optim, config.train.steps).init(split_params(params, config.train.freeze)[0]),
        # A copy, because the step donates its buffers and none may be donated twice.
        ema=jax.tree.map(jnp.copy, params) if config.optim.ema else None,
        ema_stats=jax.tree.map(jnp.copy, stats) if config.optim.ema else None,
        step=jnp.zeros((), jnp.int32),
        diverged=jnp.zeros((), bool),
    )
    return graphdef, state


def targets(mask: jax.Array, *, outputs: int, soft: bool, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """Convert a uint8 mask (N, H, W) of class indices, or of grey values if `soft`, to the target of a loss.

    A mask (N, H, W, K) of overlapping classes gives a target and valid pixels (N, H, W, K).

    Returns:
        target (N, H, W): the probability of foreground for one output, otherwise class indices, int32.
        valid (N, H, W): bool, false for ignored pixels and padding.
    """
    if soft:
        return unit_range(mask, dtype), jnp.ones(mask.shape, bool)
    valid = mask < PADDING
    return ((mask == 1).astype(dtype) if outputs == 1 or mask.ndim == 4 else mask.astype(jnp.int32)), valid


def make_train_step(
    config: Config, graphdef: Graph, outputs: int, mesh: Mesh | None = None, *, swapped: tuple[int, ...] = ()
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Compile the training step, (state, batch) -> (state, metrics). The state's buffers are donated.

    The batch holds `image` uint8 (N, H, W, C), `mask` uint8 (N, H, W), `index` and `epoch` int32 (N,). Metrics are
    scalars: loss, dice (mean over images and classes), grad_norm, learning_rate and diverged. A step whose loss or
    gradient is not finite leaves the state as it was, marked as diverged. `swapped` is as for `augment`.

    On a mesh, state and metrics are on every device, and batches come from `Placement.shard_batch`.
    """
    where = {} if mesh is None else {"out_shardings": replicated(mesh)}
    return jit(partial(train_step, config, graphdef, outputs, mesh=mesh, swapped=swapped), donate_argnums=0, **where)


def train_step(
    config: Config,
    graphdef: Graph,
    outputs: int,
    state: TrainState,
    batch: Batch,
    *,
    mesh: Mesh | None = None,
    swapped: tuple[int, ...] = (),
) -> tuple[TrainState, Metrics]:
    """Update the weights once; `make_train_step` compiles this, with its static arguments first."""
    # Augment the images, on the device.
    soft, dtype = config.data.soft_masks, _dtype(config)
    keys = sample_keys(random_stream(config.seed, _AUGMENT), batch["epoch"], batch["index"])
    pixels, padded = unit_range(batch["image"], dtype), config.data.fit == "pad"
    images, mask = augment(pixels, batch["mask"], keys, config.augment, soft=soft, padded=padded, swapped=swapped)
    target, valid = targets(mask, outputs=outputs, soft=soft, dtype=dtype)

    # Loss, logits and gradients; the forward pass also updates the running statistics.
    trained, frozen = split_params(state.params, config.train.freeze)
    loss, logits, gradients, stats = accumulate(
        graphdef,
        Execution.of(config.model.conv, remat=config.train.remat, mesh=mesh),
        make_loss(config.loss, outputs, multilabel=config.data.multilabel),
        (trained, state.stats),
        (images, target, valid),
        dropout_key(config.seed, state.step),
        config.optim.accumulate,
        frozen=frozen,
    )

    # Update the parameters and the moving averages.
    optimizer = make_optimizer(config.optim, config.train.steps)
    updates, opt_state = optimizer.update(gradients, state.opt_state, trained)
    trained = optax.apply_updates(trained, updates)
    params, ema, ema_stats = join_params(trained, frozen), None, None
    if state.ema is not None:
        average, _ = split_params(state.ema, config.train.freeze)
        ema = join_params(optax.incremental_update(trained, average, 1 - config.optim.ema), frozen)
        ema_stats = jax.tree.map(partial(_moved, share=1 - config.optim.ema), state.ema_stats, stats)

    # Keep the old state if the loss or a gradient is not finite.
    norm = optax.tree.norm(gradients)
    diverged = ~(jnp.isfinite(loss) & jnp.isfinite(norm)) | state.diverged
    step = jnp.where(diverged, state.step, state.step + 1)
    after = TrainState(params, stats, opt_state, ema, ema_stats, step, diverged)
    kept = jax.tree.map(lambda old, new: jnp.where(diverged, old, new), state, after)

    truth = jnp.round(target).astype(jnp.int32)
    overlap = config.data.multilabel
    classes = foreground_classes(outputs, multilabel=overlap)
    counts = metrics.confusion(predict_classes(logits, multilabel=overlap), truth, valid, classes)
    return dataclasses.replace(kept, diverged=diverged), {
        "loss": loss,
        "dice": metrics.dice(counts).mean(),
        "grad_norm": norm,
        "learning_rate": jnp.asarray(make_schedule(config.optim, config.train.steps)(state.step)),
        "diverged": diverged,
    }


def _moved(average: jax.Array, latest: jax.Array, share: float) -> jax.Array:
    """`average` moved towards `latest`; a counter is the latest one. What does not change keeps its bits."""
    return average + share * (latest - average) if jnp.issubdtype(average.dtype, jnp.floating) else latest


def accumulate(
    graphdef: Graph,
    execution: Execution,
    loss_function: Loss,
    weights: tuple[State, State],
    data: tuple[jax.Array, jax.Array, jax.Array],
    dropout_key: jax.Array,
    parts: int,
    *,
    frozen: State | None = None,
) -> tuple[jax.Array, jax.Array, State, State]:
    """Compute the loss, logits, mean gradient and new statistics of a batch, in `parts` micro-batches one by one.

    `weights` are parameters and running statistics; `frozen` are further parameters, without gradients. `data` is
    images (N, H, W, C) in [0, 1], and target and valid pixels as from `targets`. `parts` must divide N.
    """
    others = (frozen,) if frozen else ()

    def forward(params: State, stats: State, part: Any, key: jax.Array) -> tuple[jax.Array, tuple[jax.Array, State]]:
        images, target, valid = part
        model = nnx.merge(graphdef, params, *others, stats, copy=True)
        logits = model(images, train=True, dropout_key=key, execution=execution)
        return loss_function(logits, target, valid), (logits, nnx.state(model, nnx.BatchStat))

    gradient = jax.value_and_grad(forward, has_aux=True)
    params, stats = weights
    if parts == 1:
        (loss, (logits, stats)), gradients = gradient(params, stats, data, dropout_key)
        return loss, logits, gradients, stats

    def body(carry: Any, part: Any) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        stats, total = carry
        (loss, (logits, stats)), gradients = gradient(params, stats, part[0], part[1])
        return (stats, jax.tree.map(jnp.add, total, gradients)), (loss, logits)

    split = jax.tree.map(lambda x: x.reshape(parts, x.shape[0] // parts, *x.shape[1:]), data)
    start = stats, jax.tree.map(jnp.zeros_like, params)
    (stats, total), (losses, logits) = jax.lax.scan(body, start, (split, jax.random.split(dropout_key, parts)))
    gradients = jax.tree.map(lambda g: g / parts, total)
    return losses.mean(), logits.reshape(-1, *logits.shape[2:]), gradients, stats


def make_eval_step(
    config: Config, graphdef: Graph, outputs: int, mesh: Mesh | None = None
) -> Callable[[State, State, Batch], Metrics]:
    """Compile the validation step, (params, stats, batch) -> values for each image.

    `loss` (N,), each image's own; `tp`, `fp`, `fn`, `tn` (N, foreground classes); `prediction` (N, H, W), uint8 class
    indices, or (N, H, W, K) if classes overlap. On a mesh they are spread over the devices as the batch is.
    """
    where = {} if mesh is None else {"out_shardings": batch_sharding(mesh)}
    return jit(partial(eval_step, config, graphdef, outputs, mesh=mesh), **where)


def eval_step(
    config: Config,
    graphdef: Graph,
    outputs: int,
    params: State,
    stats: State,
    batch: Batch,
    *,
    mesh: Mesh | None = None,
) -> Metrics:
    """Score a batch; `make_eval_step` compiles this, with its static arguments first."""
    dtype = _dtype(config)
    target, valid = targets(batch["mask"], outputs=outputs, soft=config.data.soft_masks, dtype=dtype)
    model = nnx.merge(graphdef, params, stats, copy=True)
    logits = model(unit_range(batch["image"], dtype), execution=Execution.of(config.model.conv, mesh=mesh))
    overlap = config.data.multilabel
    loss_function = make_loss(config.loss, outputs, multilabel=overlap)

    def one(logits: jax.Array, target: jax.Array, valid: jax.Array) -> jax.Array:
        return loss_function(logits[None], target[None], valid[None])

    prediction = predict_classes(logits, multilabel=overlap)
    truth = jnp.round(target).astype(jnp.int32)
    counts = metrics.confusion(prediction, truth, valid, foreground_classes(outputs, multilabel=overlap))
    return {
        "loss": jax.vmap(one)(logits, target, valid),
        "prediction": prediction.astype(jnp.uint8),
        **counts._asdict(),
    }


def _dtype(config: Config) -> DTypeLike:
    """Dtype of parameters, statistics and losses."""
    return jnp.float64 if config.train.precision == "float64" else jnp.float32
