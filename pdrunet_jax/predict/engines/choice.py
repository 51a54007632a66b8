"""Open the engine that was asked for, or choose one whose masks agree with JAX's."""

from collections.abc import Callable
from functools import partial
from importlib import import_module, metadata
from importlib.util import find_spec

import numpy as np

from pdrunet_jax.predict.engines.engine import (
    GRAPH_ENGINES,
    Engine,
    EngineName,
    Precision,
    is_installed,
)
from pdrunet_jax.predict.engines.graphs import GraphEngine, has_bfloat16
from pdrunet_jax.predict.engines.weights import Weights
from pdrunet_jax.runtime.store import key_of, read_entry, write_entry

AGREEMENT: dict[Precision, float] = {"float32": 1e-4, "bfloat16": 1e-3}
"""Share of the first image's pixels whose class may differ from JAX's in float32, for `--engine auto`."""


def open_engine(weights: Weights, name: EngineName, precision: Precision) -> Engine:
    """Open the network in an engine. Raises `UserError` if it does not compute in this precision on this computer."""
    if name != "jax":
        return GraphEngine(name, precision, weights.facts, weights.graphs)
    possible = precision == "float32" and weights.count == 1
    if possible and import_module("pdrunet_jax.runtime.programs").is_possible():  # JAX
        engine: Engine = import_module("pdrunet_jax.predict.engines.programs").ProgramEngine(weights)
        return engine
    opened: Engine = import_module("pdrunet_jax.predict.engines.loading").open_network(weights, precision)
    return opened


def open_members(weights: Weights, name: EngineName, precision: Precision) -> list[Engine]:
    """Open each network of an ensemble in an engine of its own. Raises as `open_engine`."""
    if name == "jax":
        opened: list[Engine] = import_module("pdrunet_jax.predict.engines.loading").open_members(weights, precision)
        return opened
    return [
        GraphEngine(name, precision, weights.facts, partial(weights.graphs, members=[number]))
        for number in range(weights.count)
    ]


def choose_engine(
    weights: Weights, precision: Precision, mask: Callable[[Engine], np.ndarray], about: object
) -> tuple[Engine, str]:
    """The fastest installed engine whose mask of the first image agrees with JAX's, and a sentence about it.

    It is JAX where JAX has a GPU, or no other engine agrees. What was found is stored: the next command with the same
    weights does not compare again.

    Args:
        weights: the network.
        precision: arithmetic of the engine.
        mask: computes the mask of the first image with an engine.
        about: JSON values, all settings that the mask depends on but the image.
    """
    if _on_gpu():
        return open_engine(weights, "jax", precision), "jax, on a GPU"
    reasons = []
    for name in GRAPH_ENGINES:
        if not is_installed(name):
            reasons.append(f"{name} is not installed")
        elif precision == "bfloat16" and not (name == "openvino" and has_bfloat16()):
            reasons.append(f"{name} has no {precision} here")
        else:
            engine = open_engine(weights, name, precision)
            key = key_of(weights.key, name, metadata.version(name), precision, about)
            stored = read_entry("agreement", key) if weights.key else None
            differing, pixels = map(int, stored.split()) if stored else _compare(engine, weights, mask)
            if weights.key and not stored:
                write_entry("agreement", key, f"{differing} {pixels}".encode())
            found = f"{differing:,} of {pixels:,} pixels of {'an earlier' if stored else 'the first'} image differ"
            if differing <= AGREEMENT[precision] * pixels:
                return engine, f"{name}; {found} from JAX"
            reasons.append(f"{name} does not agree with JAX: {found}")
    return open_engine(weights, "jax", precision), f"jax; {'; '.join(reasons)}"


def _compare(engine: Engine, weights: Weights, mask: Callable[[Engine], np.ndarray]) -> tuple[int, int]:
    """Pixels whose class differs from JAX's in float32, and all pixels."""
    ours, theirs = mask(open_engine(weights, "jax", "float32")), mask(engine)
    return int(np.sum(ours != theirs)), ours.size


def _on_gpu() -> bool:
    """Whether JAX computes on anything but CPUs; starts JAX only where a plug-in for other devices is installed."""
    if find_spec("jax_plugins") is None:
        return False
    devices = import_module("pdrunet_jax.runtime.devices").start_devices()
    return any(device.platform != "cpu" for device in devices)
