"""Training in JAX; arrays go in and out by public name. Our networks train with the package's own training step."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from parity_tests.support.case import Arrays, Batch, Case, Objective, Trajectory, follow
from parity_tests.support.jax_side import FlaxHalf, compiled
from pdrunet_jax.config import Config, DataConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig
from pdrunet_jax.data.pipeline import position_after
from pdrunet_jax.model.layers import keep_masks
from pdrunet_jax.model.pixels import unit_range
from pdrunet_jax.model.weights import from_public, to_public
from pdrunet_jax.runtime.checkpoint import Checkpoints
from pdrunet_jax.train import step as steps_module
from pdrunet_jax.train.progress import Progress
from pdrunet_jax.train.run import open_run
from pdrunet_jax.train.step import TrainState, build_model, create_state, dropout_key, targets


@dataclasses.dataclass(frozen=True)
class Training:
    """A network, its optimizer and loss, and the number of steps."""

    case: Case
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    loss: str = "bce_dice"
    steps: int = 50
    freeze: tuple[str, ...] = ()
    """Frozen layers, as `train.freeze`."""

    def __str__(self) -> str:
        frozen = f", frozen: {' '.join(self.freeze)}" if self.freeze else ""
        return f"{self.optim.name} {self.loss} {self.case}{frozen}"

    @property
    def config(self) -> Config:
        model = ModelConfig(name=self.case.network, **self.case.options, conv=self.case.path)
        precision: Any = self.case.dtype
        return Config(
            data=DataConfig(size=self.case.shape[1:]),
            model=model,
            loss=LossConfig(name=self.loss),
            optim=self.optim,
            train=TrainConfig(
                weights="the original" if self.freeze else None,
                freeze=self.freeze,
                steps=self.steps,
                batch_size=self.case.shape[0],
                precision=precision,
            ),
        )

    def step(self, state: TrainState, number: int) -> tuple[TrainState, float]:
        """See `case.Trainer`."""
        batch = {name: jnp.asarray(array) for name, array in batches(self)[number].items()}
        state, values = _programs(self)[0](state, batch)
        return state, values["loss"]

    def finish(self, state: TrainState, number: int) -> tuple[Arrays, np.ndarray]:
        """See `case.Trainer`."""
        assert int(state.step) == number + 1
        images = unit_range(jnp.asarray(batches(self)[number]["image"]), jnp.dtype(self.case.dtype))
        logits = np.asarray(_programs(self)[1](state.params, state.stats, images))
        return to_public(state.params, state.stats, dead_block=False), logits


@dataclasses.dataclass(frozen=True, eq=False)
class PortTrainer:
    """Training of any Flax module with an optax optimizer; see `case.Trainer`. The state is a tuple of three trees."""

    half: FlaxHalf
    batch: Callable[[int], Batch]
    loss: Callable[[jax.Array, Any], jax.Array]
    optimizer: optax.GradientTransformation

    def start(self, arrays: Arrays) -> Any:
        """Return parameters, other state, and the optimizer's state before the first step."""
        _, params, *parts = nnx.split(self.half.build(arrays), nnx.Param, nnx.BatchStat, ...)
        return params, tuple(parts), self.optimizer.init(params)

    def step(self, state: Any, number: int) -> tuple[Any, float]:
        """See `case.Trainer`."""
        batch = self.batch(number)
        return self._programs[0](state, jnp.asarray(batch.images), jnp.asarray(batch.target))

    def finish(self, state: Any, number: int) -> tuple[Arrays, np.ndarray]:
        """See `case.Trainer`."""
        params, parts, _ = state
        output = self._programs[1](params, parts, jnp.asarray(self.batch(number).images))
        return self.half.named(params, parts[0]), np.asarray(output)

    @cached_property
    def _programs(self) -> tuple[Any, Any]:
        graph = nnx.graphdef(self.half.build(self.half.blank()))

        def forward(params: Any, parts: Any, images: jax.Array, train: bool) -> tuple[jax.Array, Any]:
            model = nnx.merge(graph, params, *parts, copy=True)
            output = self.half.call(model, images, train=train, masks=None, tap=lambda name, value: None)
            return output, tuple(nnx.split(model, nnx.Param, nnx.BatchStat, ...)[2:])

        def step(state: Any, images: jax.Array, target: Any) -> Any:
            params, parts, moments = state

            def objective(params: Any) -> Any:
                output, after = forward(params, parts, images, True)
                return self.loss(output, target), after

            (value, after), gradients = jax.value_and_grad(objective, has_aux=True)(params)
            changes, moments = self.optimizer.update(gradients, moments, params)
            return (optax.apply_updates(params, changes), after, moments), value

        return compiled(step), compiled(lambda params, parts, images: forward(params, parts, images, False)[0])


def updates(
    optimizer: optax.GradientTransformation,
    parameters: Arrays,
    gradients: Sequence[Arrays],
    others: Sequence[Arrays] = (),
) -> list[Arrays]:
    """Return the parameters after each update; with `others`, each update starts from the parameters there."""

    @jax.jit
    def update(gradient: Any, state: Any, current: Any) -> Any:
        changes, state = optimizer.update(gradient, state, current)
        return optax.apply_updates(current, changes), state

    current: Any = jax.tree.map(jnp.asarray, parameters)
    state, result = optimizer.init(current), []
    for number, gradient in enumerate(gradients):
        if others and number:
            current = jax.tree.map(jnp.asarray, others[number - 1])
        current, state = update(gradient, state, current)
        result.append(jax.tree.map(np.asarray, current))
    return result


@cache
def batches(training: Training) -> list[dict[str, np.ndarray]]:
    """Return random batches in the form of the data pipeline, one a step."""
    case, rng = training.case, np.random.default_rng(5)
    classes = max(case.outputs, 2)
    return [
        {
            "image": rng.integers(0, 256, (*case.shape, case.in_channels), np.uint8),
            "mask": np.where(rng.random(case.shape) < 0.05, 255, rng.integers(0, classes, case.shape)).astype(np.uint8),
            "index": np.arange(case.shape[0], dtype=np.int32),
            "epoch": np.full(case.shape[0], number, np.int32),
        }
        for number in range(training.steps)
    ]


def as_steps(training: Training, chosen: slice = slice(None)) -> dict[int, Batch]:
    """Return the same batches for PyTorch by number, with the dropout masks that JAX draws."""
    case, dtype = training.case, jnp.dtype(training.case.dtype)
    result = {}
    for number, batch in list(enumerate(batches(training)))[chosen]:
        target, valid = targets(jnp.asarray(batch["mask"]), outputs=case.outputs, soft=False, dtype=dtype)
        masks = keep_masks(dropout_key(0, number), case.dropout, case.mask_shapes)
        images = unit_range(jnp.asarray(batch["image"]), dtype)
        objective = Objective(training.loss, case.outputs, np.asarray(target), np.asarray(valid))
        result[number] = Batch(np.asarray(images), objective, [np.asarray(mask) for mask in masks])
    return result


@cache
def _programs(training: Training) -> tuple[Any, Any]:
    config, outputs = training.config, training.case.outputs
    graphdef = create_state(config, build_model(config, outputs))[0]
    step = compiled(partial(steps_module.train_step, config, graphdef, outputs))

    def evaluate(params: Any, stats: Any, images: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params, stats, copy=True)(images)

    return step, compiled(evaluate)


def start(training: Training, arrays: Arrays) -> TrainState:
    """Return the state before the first step, with the twin's arrays."""
    config, imported = training.config, from_public(arrays, "the twin")
    state = create_state(config, build_model(config, training.case.outputs))[1]
    params, stats = (jax.tree.map(jnp.asarray, part) for part in (imported.params, imported.stats))
    return dataclasses.replace(state, params=params, stats=stats)


def train(training: Training, state: TrainState, chosen: slice) -> tuple[TrainState, Trajectory]:
    """Run the `chosen` steps of the training from `state`."""
    return follow(training, state, range(training.steps)[chosen])


def save(training: Training, state: TrainState, folder: Path) -> None:
    """Make `folder` a run folder with one checkpoint, as written by `pdrunet_jax.train`."""
    run, step = open_run(folder, training.config), int(state.step)
    Checkpoints(run.checkpoints, 1, 1).save(step, state, position_after(step), Progress(data="").to_dict())


def restore(training: Training, folder: Path) -> TrainState:
    """Read the state of the newest checkpoint in a run folder, as `pdrunet_jax.train` does on resume."""
    config = training.config
    template = create_state(config, build_model(config, training.case.outputs))[1]
    restored = Checkpoints(folder / "checkpoints", 1, 1).restore(template)
    assert restored is not None
    state: TrainState = restored.state
    return state
