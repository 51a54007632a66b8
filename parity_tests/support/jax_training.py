"""Training in JAX with the package's own training step; arrays go in and out by public name."""

import dataclasses
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from parity_tests.support.case import Arrays, Case, Step, Trajectory
from parity_tests.support.jax_side import compiled
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

    def __str__(self) -> str:
        return f"{self.optim.name} {self.loss} {self.case}"

    @property
    def config(self) -> Config:
        model = ModelConfig(name=self.case.network, **self.case.options, conv=self.case.path)
        precision: Any = self.case.dtype
        return Config(
            data=DataConfig(size=self.case.shape[1:]),
            model=model,
            loss=LossConfig(name=self.loss),
            optim=self.optim,
            train=TrainConfig(steps=self.steps, batch_size=self.case.shape[0], precision=precision),
        )


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


def as_steps(training: Training) -> list[Step]:
    """Return the same batches for PyTorch, with the dropout masks that JAX draws."""
    case, dtype = training.case, jnp.dtype(training.case.dtype)
    result = []
    for number, batch in enumerate(batches(training)):
        target, valid = targets(jnp.asarray(batch["mask"]), outputs=case.outputs, soft=False, dtype=dtype)
        masks = keep_masks(dropout_key(0, number), case.dropout, case.mask_shapes)
        images = unit_range(jnp.asarray(batch["image"]), dtype)
        result.append(Step(*map(np.asarray, (images, target, valid)), [np.asarray(mask) for mask in masks]))
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
    step, evaluate = _programs(training)
    losses = []
    some = batches(training)[chosen]
    for batch in some:
        state, values = step(state, {name: jnp.asarray(array) for name, array in batch.items()})
        losses.append(float(values["loss"]))
    assert int(state.step) == chosen.stop
    images = unit_range(jnp.asarray(some[-1]["image"]), jnp.dtype(training.case.dtype))
    logits = np.asarray(evaluate(state.params, state.stats, images))
    return state, Trajectory(losses, to_public(state.params, state.stats, dead_block=False), logits)


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
