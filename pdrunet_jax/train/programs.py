"""The steps of a run as stored programs: on one CPU, a run starts without tracing them."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jax.sharding import Mesh

from pdrunet_jax.config import MAY_CHANGE, OF_THE_END, Config, diff
from pdrunet_jax.model.execution import Execution, custom_calls
from pdrunet_jax.model.layers import State
from pdrunet_jax.runtime.programs import Program, is_possible, load_program, make_program
from pdrunet_jax.runtime.store import program_key
from pdrunet_jax.train.step import (
    Batch,
    Graph,
    Metrics,
    TrainState,
    eval_step,
    make_eval_step,
    make_train_step,
    train_step,
)

_WITHOUT_EFFECT = (*(name for name in MAY_CHANGE if name not in OF_THE_END), "data.fold")
"""Settings that change no step, but for the shape of the batches."""


class StepPrograms:
    """The training and validation steps of a run.

    If the training step is stored, it is loaded in the background from now on, while the network is built.

    Args:
        config: the run's settings, with numbers for class weights.
        outputs: output channels of the network.
        mesh: devices of the run; None for one.
        swapped: as for `augment`.
    """

    def __init__(self, config: Config, outputs: int, mesh: Mesh | None, swapped: tuple[int, ...]) -> None:
        self._config, self._outputs, self._mesh, self._swapped = config, outputs, mesh, swapped
        self._stored = mesh is None and is_possible()
        if self._stored:
            path = Execution.of(config.model.conv).path
            calls = custom_calls("float64" if config.train.precision == "float64" else "float32")
            about = diff(Config(), config, ignore=_WITHOUT_EFFECT), outputs, swapped, path
            self._train = _Stored(program_key((), "train", *about), calls, donate=(0,), ahead=True)
            self._eval = _Stored(program_key((), "eval", *about, config.train.eval_batch_size), calls)

    def train_step(self, graphdef: Graph) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
        """What `make_train_step` makes."""
        config, outputs, swapped = self._config, self._outputs, self._swapped
        if not self._stored:
            return make_train_step(config, graphdef, outputs, self._mesh, swapped=swapped)

        def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
            leaves, structure = jax.tree.flatten(state)

            def flat(leaves: list[jax.Array], batch: Batch) -> tuple[list[jax.Array], Metrics]:
                before = jax.tree.unflatten(structure, leaves)
                after, metrics = train_step(config, graphdef, outputs, before, batch, swapped=swapped)
                return jax.tree.leaves(after), metrics

            leaves, metrics = self._train(flat, leaves, batch)
            return jax.tree.unflatten(structure, leaves), metrics

        return step

    def eval_step(self, graphdef: Graph) -> Callable[[State, State, Batch], Metrics]:
        """What `make_eval_step` makes."""
        config, outputs = self._config, self._outputs
        if not self._stored:
            return make_eval_step(config, graphdef, outputs, self._mesh)

        def step(params: State, stats: State, batch: Batch) -> Metrics:
            leaves, structure = jax.tree.flatten((params, stats))

            def flat(leaves: list[jax.Array], batch: Batch) -> Metrics:
                params, stats = jax.tree.unflatten(structure, leaves)
                return eval_step(config, graphdef, outputs, params, stats, batch)

            metrics: Metrics = self._eval(flat, leaves, batch)
            return metrics

        return step


class _Stored:
    """A function of lists and dictionaries of arrays: its stored program, or one that is made at the first call."""

    def __init__(self, key: str, calls: tuple[str, ...], *, donate: tuple[int, ...] = (), ahead: bool = False) -> None:
        self._key, self._calls, self._donate = key, calls, donate
        self._program: Program | None = None
        self._load: Callable[[], Program | None] = lambda: load_program(key, donate)
        if ahead:
            background = ThreadPoolExecutor(1)
            self._load = background.submit(self._load).result
            background.shutdown(wait=False)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if self._program is None:
            self._program = self._load() or make_program(self._key, function, arguments, self._donate, self._calls)
        return self._program(*arguments)
