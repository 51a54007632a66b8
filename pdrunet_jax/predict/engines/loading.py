"""What `Weights` needs JAX for: load the network, describe it, and take it apart."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import import_module
from typing import Any

import jax
import numpy as np
from flax import nnx

from pdrunet_jax.model.base import Network
from pdrunet_jax.model.ensemble import weights_digest
from pdrunet_jax.model.load import Loaded, build_loaded, load_any
from pdrunet_jax.model.onnx_network import IR_VERSION, OPSET, Nodes, add_network
from pdrunet_jax.model.pixels import unit_range
from pdrunet_jax.predict.engines.engine import Facts, Precision
from pdrunet_jax.predict.engines.network import NetworkEngine
from pdrunet_jax.predict.engines.weights import Weights


def load(path: str, *, quiet: bool = False, dtype: str | None = None) -> tuple[Loaded, Network]:
    """Weights and their network; without the notes on files that others have written if they were printed before."""
    loaded = load_any(path)
    return loaded, build_loaded(loaded._replace(notes=()) if quiet else loaded, dtype=dtype)


def open_network(weights: Weights, precision: Precision) -> NetworkEngine:
    """The network itself as an engine."""
    if precision == "float32":
        return NetworkEngine(weights.network)
    return NetworkEngine(load(weights.path, quiet=True, dtype=precision)[1], precision)


def describe(loaded: Loaded, network: Network) -> dict[str, Any]:
    """Everything that `Weights` states, as JSON values."""
    wiring: dict[str, Any] = {"shortcut": network.config.shortcut, "in_channels": network.config.in_channels}
    if network.config.up == "bilinear_corners":  # the arrays show everything else
        wiring["up"] = network.config.up
    return {
        "facts": asdict(Facts.of(network)),
        "options": loaded.options,
        "wiring": {**wiring, "name": network.config.name},
        "digest": weights_digest(network, wiring),
        "count": len(network.members),
        "notes": list(loaded.notes) if loaded.source else [],
    }


def open_members(weights: Weights, precision: Precision) -> list[NetworkEngine]:
    """Each network of an ensemble as an engine."""
    return [NetworkEngine(member, precision) for member in open_network(weights, precision).network.members]


def arrays_of(network: Network) -> list[np.ndarray]:
    """The arrays of a network, in the order that `flat_forward` takes them."""
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(network))]


def flat_forward(network: Network) -> Callable[[Sequence[jax.Array], jax.Array], jax.Array]:
    """The forward pass from the arrays of `arrays_of` and images (N, H, W, C), uint8, to logits (N, H, W, K)."""
    graph, state = nnx.split(network)
    structure = jax.tree.structure(state)

    def run(arrays: Sequence[jax.Array], images: jax.Array) -> jax.Array:
        return nnx.merge(graph, jax.tree.unflatten(structure, arrays))(unit_range(images))

    return run


def network_graph(model: Network, size: tuple[int, int] | None) -> bytes:
    """The network alone as a serialised ONNX model, float32; needs the package onnx.

    The input "images" is (N, C, height, width), in [0, 1]; the output "logits" is (N, K, height, width). `size` is
    (height, width); None leaves it open, for networks that do not halve the resolution.

    Raises `UserError` if images of this size are too small.
    """
    onnx = import_module("onnx")
    if size is not None:
        model.check_size(size)
    nodes, helper, types = Nodes(onnx), onnx.helper, onnx.TensorProto
    logits = add_network(nodes, "images", model, size)
    nodes.add("Identity", logits, output="logits")
    shape = size or ("height", "width")
    images = helper.make_tensor_value_info("images", types.FLOAT, ["N", model.in_channels, *shape])
    output = helper.make_tensor_value_info("logits", types.FLOAT, ["N", model.outputs, *shape])
    graph = helper.make_graph(nodes.nodes, "network", [images], [output], initializer=nodes.initializers)
    opset = [helper.make_opsetid("", OPSET)]
    proto = helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION, producer_name="pdrunet-jax")
    return bytes(proto.SerializeToString())
