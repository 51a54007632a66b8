"""Time and memory of networks, measured in turns, so that whatever else the machine does disturbs all alike."""

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError

from pdrunet_jax.config import Config
from pdrunet_jax.data.dataset import Dataset
from pdrunet_jax.data.pipeline import train_batches
from pdrunet_jax.model.sides import swapped
from pdrunet_jax.predict.inference import forward
from pdrunet_jax.runtime.devices import Placement
from pdrunet_jax.runtime.files import atomic_write, writing
from pdrunet_jax.runtime.opening import read_text
from pdrunet_jax.runtime.stop import StopFlag
from pdrunet_jax.train.run import choose_devices, choose_outputs, settle_flips
from pdrunet_jax.train.step import build_model, create_state, make_train_step

ROUNDS = 7
"""Turns of each network; the median counts."""
TURN = 0.3
"""Least seconds of a turn: short steps are repeated, because the clock and the system disturb a single one."""
MOST_REPEATS = 50


@dataclasses.dataclass(frozen=True)
class Speed:
    """Time and memory of a network on this machine, at the size and batch size of training."""

    __pydantic_config__ = ConfigDict(extra="ignore", allow_inf_nan=False)

    parameters: int
    step_seconds: float
    """Median time of a training step, without waiting for data."""
    image_seconds: float
    """Median time of inference divided by the images of a batch."""
    step_bytes: int | None
    """Memory of a training step as the compiler plans it: weights, optimizer, batch and temporary arrays."""


def measure(configs: Mapping[str, Config], dataset: Dataset, stop: StopFlag) -> dict[str, Speed] | None:
    """Measure the networks of `configs`, which differ in `model` alone, on a batch of `dataset`; None if asked to stop.

    Raises as training would: for classes or devices that do not fit the settings.
    """
    rivals = {}
    for name, config in configs.items():
        if stop:
            return None
        rivals[name] = _Rival(settle_flips(config, dataset), dataset)
    for _ in range(ROUNDS):
        for kind in ("step", "inference"):
            for rival in rivals.values():
                if stop:
                    return None
                rival.turn(kind)
    return {name: rival.speed() for name, rival in rivals.items()}


def read_speed(path: Path) -> dict[str, Speed]:
    """The networks in a speed.json; none if it is missing or damaged, since they can be measured again."""
    try:
        return TypeAdapter(dict[str, Speed]).validate_python(json.loads(read_text(path))["networks"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, ValidationError):
        return {}


def write_speed(path: Path, speeds: Mapping[str, Speed], about: Mapping[str, Any]) -> None:
    """Write speed.json, with what the measurement depends on. Raises `RunError`."""
    networks = {name: dataclasses.asdict(speed) for name, speed in speeds.items()}
    with writing(path):
        atomic_write(path, json.dumps({**about, "networks": networks}, indent=2) + "\n")


class _Rival:
    """A network with its compiled training step."""

    def __init__(self, config: Config, dataset: Dataset) -> None:
        batch_size, channels = config.train.batch_size, config.model.in_channels
        batches = train_batches(dataset, config.data, batch_size=batch_size, channels=channels, seed=config.seed)
        batch = next(batches)
        batches.close()
        outputs = choose_outputs(config, dataset)
        mesh, _ = choose_devices(batch_size)
        place = Placement(mesh)
        self._model = build_model(config, outputs)
        self._images = np.asarray(batch["image"])
        graphdef, state = create_state(config, build_model(config, outputs))  # another: the step donates its arrays
        self.parameters = sum(math.prod(array.shape) for array in jax.tree.leaves(state.params))
        self._state, self._batch = place.replicate(state), place.shard_batch(batch)
        turns = swapped(dataset.class_names, dataset.swap_on_flip or ())
        step: Any = make_train_step(config, graphdef, outputs, mesh, swapped=turns)
        self._step = step.lower(self._state, self._batch).compile()
        self._seconds: dict[str, list[float]] = {"step": [], "inference": []}
        self._run: dict[str, Callable[[], Any]] = {"step": self._train, "inference": self._infer}
        self._repeats = {kind: 1 for kind in self._run}
        for kind, run in self._run.items():
            run()  # compiles inference; the first run of any program takes longer
            began = time.perf_counter()
            run()
            once = time.perf_counter() - began
            self._repeats[kind] = max(1, min(MOST_REPEATS, math.ceil(TURN / max(once, 1e-6))))

    def turn(self, kind: str) -> None:
        """Time some repetitions."""
        began = time.perf_counter()
        for _ in range(self._repeats[kind]):
            self._run[kind]()
        self._seconds[kind].append((time.perf_counter() - began) / self._repeats[kind])

    def speed(self) -> Speed:
        """Medians of all turns."""
        step, inference = (statistics.median(self._seconds[kind]) for kind in ("step", "inference"))
        return Speed(self.parameters, step, inference / len(self._images), self._bytes())

    def _train(self) -> None:
        self._state, metrics = self._step(self._state, self._batch)
        jax.block_until_ready((self._state, metrics))

    def _infer(self) -> None:
        jax.block_until_ready(forward(self._model, self._images))

    def _bytes(self) -> int | None:
        plan = self._step.memory_analysis()
        if plan is None:
            return None
        passed = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
        return int(plan.temp_size_in_bytes + passed)
