"""JAX as an engine: the network itself, compiled once for each architecture and shape of images."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx

from pdrunet_jax.model.base import Network
from pdrunet_jax.model.ensemble import average_logits
from pdrunet_jax.model.pixels import unit_range
from pdrunet_jax.predict.engines.engine import Engine, Facts, Precision
from pdrunet_jax.runtime import compile as compiling
from pdrunet_jax.runtime.devices import Placement, over_devices

T = TypeVar("T")
R = TypeVar("R")


class NetworkEngine(Engine):
    """A network on JAX's devices."""

    def __init__(self, network: Network, precision: Precision = "float32") -> None:
        super().__init__("jax", precision, Facts.of(network))
        self.network = network

    def logits(self, images: np.ndarray) -> np.ndarray:
        """As of `Engine`."""
        return np.asarray(network_logits(self.network, images))

    def spread(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, Callable[[], R]]]:
        """As of `Engine`; the devices of this process take turns."""
        return over_devices(function, items)


def network_logits(network: Network, images: np.ndarray) -> jax.Array:
    """Logits (N, H, W, K) of uint8 images (N, H, W, C), in evaluation mode.

    Compiled once for each architecture and shape, not for each set of weights, nor for each member of an ensemble.
    """
    return _logits([nnx.split(member) for member in network.members], jax.device_put(images), network)


def predict_batches(
    model: Network | Engine, batches: Iterable[Mapping[str, np.ndarray]], place: Placement
) -> Iterator[tuple[Mapping[str, np.ndarray], Any]]:
    """Each batch with its logits (N, H, W, K), computed by the engine or on the devices of `place`.

    A batch holds "image", uint8 (N, H, W, C): this process's share.
    """
    if isinstance(model, Engine):
        yield from ((batch, model.logits(batch["image"])) for batch in batches)
        return
    members = [nnx.split(member) for member in model.members]
    placed = [(graphdef, place.replicate(state)) for graphdef, state in members]
    for batch in batches:
        images = place.shard_batch({"image": batch["image"]})["image"]
        yield batch, _logits(placed, images, model)


@cache
def compiled_forward() -> Any:
    """Compile the forward pass, at its first call: querying compiler options starts the backend, no import must."""

    def run(graphdef: nnx.GraphDef[Network], state: nnx.State[Any, Any], images: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, state)
        return model(unit_range(images))

    return compiling.jit(run, static_argnums=0)


def _logits(members: Iterable[tuple[Any, Any]], images: jax.Array, network: Network) -> jax.Array:
    """Logits of the split `members` of `network`, averaged."""
    logits = [compiled_forward()(graphdef, state, images) for graphdef, state in members]
    return average_logits(logits, multilabel=network.multilabel)
