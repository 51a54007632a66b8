"""Nodes and constants of an ONNX graph, named and put in order as they are added.

Pillow's bilinear `resize` in an ONNX graph: weights made from the image's size, and a product for each axis.

The network as an ONNX graph, made node by node under the public names: from uint8 images to masks of their size.
"""

import importlib
import json
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np
from flax import nnx
from numpy.typing import DTypeLike

from pdrunet_jax.export.stablehlo import FIXED_POINT
from pdrunet_jax.model.fast.convolution import EPSILON
from pdrunet_jax.model.network import Block, PDRUNet
from pdrunet_jax.model.weights import to_public
from pdrunet_jax.runtime.errors import UserError


class Nodes:
    """A graph, or a branch of one, in the making.

    Args:
        onnx: the package of that name.
        parent: the graph that this is a branch of; a branch may use the parent's values and keeps its constants there.

    Attributes:
        nodes: in the order in which they were added.
        initializers: constants, the weights among them.
    """

    def __init__(self, onnx: ModuleType, parent: "Nodes | None" = None) -> None:
        self._onnx = onnx
        self.nodes: list[Any] = []
        self.initializers: list[Any] = parent.initializers if parent else []
        self._counts: dict[str, int] = parent._counts if parent else {}

    def constant(self, value: Any, name: str | None = None) -> str:
        """The name of a constant tensor."""
        array = np.asarray(value)
        name = name or self._new("constant")
        self.initializers.append(self._onnx.numpy_helper.from_array(array, name))
        return name

    def add(self, op: str, *inputs: str, name: str | None = None, output: str | None = None, **attributes: Any) -> str:
        """Add a node; its output bears the name of the node where no other is given."""
        name = name or output or self._new(op)
        output = output or name
        self.nodes.append(self._onnx.helper.make_node(op, inputs, [output], name=name, **attributes))
        return output

    def cast(self, x: str, dtype: DTypeLike, output: str | None = None) -> str:
        """`x` in another type."""
        return self.add("Cast", x, to=self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), output=output)

    def choose(self, condition: str, then: tuple["Nodes", str], other: tuple["Nodes", str]) -> str:
        """The value that one of two branches ends with; only that branch is computed."""
        helper = self._onnx.helper
        graphs = [
            helper.make_graph(branch.nodes, self._new("branch"), [], [helper.make_empty_tensor_value_info(value)])
            for branch, value in (then, other)
        ]
        return self.add("If", condition, then_branch=graphs[0], else_branch=graphs[1])

    def branch(self) -> "Nodes":
        """An empty branch, for `choose`."""
        return Nodes(self._onnx, self)

    def _new(self, kind: str) -> str:
        self._counts[kind] = self._counts.get(kind, 0) + 1
        return f"{kind}_{self._counts[kind]}"


def resize_images(nodes: Nodes, images: str, shape: tuple[str, str], size: tuple[int, int], tall_first: bool) -> str:
    """Images (N, C, H, W) resized to `size`, as float64 that hold whole grey values: Pillow's, bit for bit.

    Args:
        nodes: the graph to add to.
        images: name of (N, C, H, W), uint8.
        shape: names of H and W, int64 scalars.
        size: (height, width).
        tall_first: how Pillow orders its passes; see `pdrunet_jax.resampling`.
    """
    targets = [nodes.constant(np.int64(side)) for side in size]
    rows = _fixed_point(nodes, _weights(nodes, shape[0], targets[0]))
    columns = _fixed_point(nodes, _weights(nodes, shape[1], targets[1], transposed=True))
    pixels = nodes.cast(images, np.float64)  # exact: all sums of the two products are integers below 2^53

    def horizontal(nodes: Nodes, x: str) -> str:
        return _rounded(nodes, nodes.add("MatMul", x, columns))

    def vertical(nodes: Nodes, x: str) -> str:
        return _rounded(nodes, nodes.add("MatMul", rows, x))

    if not tall_first:
        return vertical(nodes, horizontal(nodes, pixels))
    shrunk = [nodes.add("Sub", *sides) for sides in zip(shape, targets, strict=True)]
    twice = nodes.add("Mul", shrunk[1], nodes.constant(np.int64(2)))
    limit = nodes.add("Max", twice, nodes.constant(np.int64(0)))
    then, other = nodes.branch(), nodes.branch()
    first_vertical = horizontal(then, vertical(then, pixels))
    first_horizontal = vertical(other, horizontal(other, pixels))
    tall = nodes.add("Greater", shrunk[0], limit)
    return nodes.choose(tall, (then, first_vertical), (other, first_horizontal))


def restore(nodes: Nodes, probability: str, size: tuple[int, int], shape: tuple[str, str]) -> str:
    """(N, K, height, width) of `size`, float32, brought to (N, K, H, W); `shape` as in `resize_images`."""
    sources = [nodes.constant(np.int64(side)) for side in size]
    rows = nodes.cast(_weights(nodes, sources[0], shape[0]), np.float32)
    columns = nodes.cast(_weights(nodes, sources[1], shape[1], transposed=True), np.float32)
    return nodes.add("MatMul", rows, nodes.add("MatMul", probability, columns))


def _weights(nodes: Nodes, source: str, target: str, *, transposed: bool = False) -> str:
    """The matrix (target, source) of `pdrunet_jax.resampling`, float64, before any rounding.

    Its transpose is built as such: onnxruntime merges `Transpose` and `MatMul` into a node that not all its versions
    have for float64.
    """
    zero, half, one = (nodes.constant(np.float64(value)) for value in (0, 0.5, 1))
    first, last = nodes.constant(np.array([0])), nodes.constant(np.array([1]))
    beside_sources, beside_targets = (last, first) if transposed else (first, last)
    scale = nodes.add("Div", nodes.cast(source, np.float64), nodes.cast(target, np.float64))
    narrower = nodes.add("Div", one, nodes.add("Max", scale, one))
    centres = nodes.add("Mul", nodes.add("Add", _count(nodes, target), half), scale)
    positions = nodes.add("Unsqueeze", _count(nodes, source), beside_sources)
    offset = nodes.add("Sub", positions, nodes.add("Unsqueeze", centres, beside_targets))
    distance = nodes.add("Abs", nodes.add("Mul", nodes.add("Add", offset, half), narrower))
    weights = nodes.add("Max", nodes.add("Sub", one, distance), zero)
    return nodes.add("Div", weights, nodes.add("ReduceSum", weights, beside_targets, keepdims=1))


def _count(nodes: Nodes, number: str) -> str:
    """0, 1, ... below an int64 scalar, float64."""
    return nodes.cast(nodes.add("Range", nodes.constant(np.int64(0)), number, nodes.constant(np.int64(1))), np.float64)


def _fixed_point(nodes: Nodes, weights: str) -> str:
    scaled = nodes.add("Mul", weights, nodes.constant(np.float64(2**FIXED_POINT)))
    return nodes.add("Floor", nodes.add("Add", scaled, nodes.constant(np.float64(0.5))))


def _rounded(nodes: Nodes, sums: str) -> str:
    """Sums of grey values in `FIXED_POINT` as whole grey values."""
    halved = nodes.add("Add", sums, nodes.constant(np.float64(2 ** (FIXED_POINT - 1))))
    return nodes.add("Floor", nodes.add("Mul", halved, nodes.constant(np.float64(2.0**-FIXED_POINT))))


OPSET = 17
IR_VERSION = 8
"""What a runtime has to know: ONNX 1.12 (2022) and later, onnxruntime 1.13 and later."""


def build_onnx(
    model: PDRUNet, *, size: tuple[int, int], threshold: float, tall_first: bool, metadata: Mapping[str, Any]
) -> bytes:
    """The serialised model.

    Its input "images" is uint8 (N, H, W, C); its outputs are "mask", uint8 (N, H, W), "probability", float32 (N, H, W)
    or (N, H, W, K) for K > 1 outputs, and "logits", float32 (N, height, width, K). N, H and W are free.

    Args:
        model: in float32.
        size: (height, width) that the network works at.
        threshold: probability above which a pixel is foreground, for one output.
        tall_first: how Pillow orders its passes; see `pdrunet_jax.resampling`.
        metadata: JSON values; they become `metadata_props`, each as JSON where it is no text.

    Raises:
        UserError: the package onnx is missing.
    """
    onnx = require("onnx")
    helper, types = onnx.helper, onnx.TensorProto
    nodes = Nodes(onnx)
    shape = nodes.add("Shape", "images")
    height, width = (nodes.add("Gather", shape, nodes.constant(np.int64(axis))) for axis in (1, 2))
    channels_first = nodes.add("Transpose", "images", perm=[0, 3, 1, 2])
    pixels = resize_images(nodes, channels_first, (height, width), size, tall_first)
    unit = nodes.add("Div", nodes.cast(pixels, np.float32), nodes.constant(np.float32(255)))
    logits = _network(nodes, unit, model)
    small = nodes.add("Sigmoid", logits) if model.outputs == 1 else nodes.add("Softmax", logits, axis=1)
    large = restore(nodes, small, size, (height, width))
    if model.outputs == 1:
        nodes.add("Squeeze", large, nodes.constant(np.array([1])), output="probability")
        decided = nodes.add("Greater", "probability", nodes.constant(np.float32(threshold)))
    else:
        nodes.add("Transpose", large, perm=[0, 2, 3, 1], output="probability")
        decided = nodes.add("ArgMax", "probability", axis=-1, keepdims=0)
    nodes.cast(decided, np.uint8, output="mask")
    nodes.add("Transpose", logits, perm=[0, 2, 3, 1], output="logits")

    classes = [] if model.outputs == 1 else [model.outputs]
    outputs = [
        helper.make_tensor_value_info("mask", types.UINT8, ["N", "H", "W"]),
        helper.make_tensor_value_info("probability", types.FLOAT, ["N", "H", "W", *classes]),
        helper.make_tensor_value_info("logits", types.FLOAT, ["N", *size, model.outputs]),
    ]
    images = helper.make_tensor_value_info("images", types.UINT8, ["N", "H", "W", model.in_channels])
    graph = helper.make_graph(nodes.nodes, "pdrunet", [images], outputs, initializer=nodes.initializers)
    proto = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="pdrunet-jax",
        producer_version=str(metadata.get("version", "")),
    )
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    helper.set_model_props(proto, texts)
    onnx.checker.check_model(proto, full_check=True)
    return bytes(proto.SerializeToString())


def open_onnx(data: bytes) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """The model in onnxruntime on the CPU, from images to its outputs by name.

    Raises `UserError` if the package is missing.
    """
    runtime = require("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors; warnings are about the machine
    session = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(names, session.run(names, {"images": images}), strict=True))

    return run


def require(package: str) -> ModuleType:
    """The package, one of the extra `export`. Raises `UserError` if it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"--format onnx needs {package}: pip install 'pdrunet-jax[export]'") from None


def _network(nodes: Nodes, images: str, model: PDRUNet) -> str:
    """Logits (N, K, h, w) of images (N, C, h, w) in [0, 1]; wired as `PDRUNet.__call__` is."""
    arrays = to_public(nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat), dead_block=False)

    def convolution(x: str, name: str, norm: str | None, dilation: int = 1) -> str:
        kernel, bias = _folded(arrays, name, norm)
        reach = dilation * (kernel.shape[-1] // 2)
        names = nodes.constant(kernel, f"{name}.weight"), nodes.constant(bias, f"{name}.bias")
        return nodes.add(
            "Conv", x, *names, kernel_shape=kernel.shape[2:], dilations=[dilation] * 2, pads=[reach] * 4, name=name
        )

    def block(name: str, x: str) -> str:
        layers: Block = getattr(model, name)
        public, dilation = layers.name, layers.dilation
        norms = (f"{public}.bnorm1", f"{public}.bnorm2") if model.norm == "batch" else (None, None)
        c1 = nodes.add("Relu", convolution(x, f"{public}.first", norms[0], dilation))
        c2 = convolution(c1, f"{public}.second", norms[1], dilation)
        if layers.residual:
            c2 = nodes.add("Add", c2, x if layers.shortcut == "input" else c1)
        return nodes.add("Relu", c2, name=public)

    def plus(a: str, b: str) -> str:
        return nodes.add("Add", a, b)

    x0 = block("std_block", images)
    x1 = block("e1", x0)
    x2 = block("e2", plus(x1, x0))
    x3 = block("e3", x2)
    x4 = block("e4", plus(x3, x2))
    z = block("bottleneck_4", block("bottleneck_2", block("bottleneck_0", x4)))
    u1 = plus(block("d1", plus(x4, z)), z)
    u2 = block("d2", plus(x3, u1))
    u3 = plus(block("d3", plus(x2, u2)), u2)
    u4 = block("d4", plus(x1, u3))
    u5 = block("d5", plus(x0, u4))
    return convolution(u5, "final_conv", None)


def _folded(arrays: Mapping[str, np.ndarray], name: str, norm: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Kernel and bias, float32, of a convolution with the normalisation after it, a fixed affine map, folded in."""
    kernel, bias = (arrays[f"{name}.{part}"].astype(np.float64) for part in ("weight", "bias"))
    if norm is not None:
        scale, shift, mean, var = (
            arrays[f"{norm}.{part}"].astype(np.float64) for part in ("weight", "bias", "running_mean", "running_var")
        )
        factor = scale / np.sqrt(var + EPSILON)
        kernel, bias = kernel * factor[:, None, None, None], (bias - mean) * factor + shift
    return kernel.astype(np.float32), bias.astype(np.float32)
