"""A network as nodes of an ONNX graph, under the public names, with normalisation folded into the convolutions."""

import dataclasses
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from pdrunet_jax.model.base import Network
from pdrunet_jax.model.fusionnet import Level
from pdrunet_jax.model.layers import EPSILON, split_state
from pdrunet_jax.model.weights import to_public

OPSET = 17
IR_VERSION = 8
"""Supported from ONNX 1.12 (2022) and onnxruntime 1.13 on."""


class Nodes:
    """A graph under construction, or a branch of one. A branch can use its parent's values and shares its constants.

    Attributes:
        nodes: Nodes in the order they were added.
        initializers: Constants, including the weights.
    """

    def __init__(self, onnx: ModuleType, parent: "Nodes | None" = None) -> None:
        self._onnx = onnx
        self.nodes: list[Any] = []
        self.initializers: list[Any] = parent.initializers if parent else []
        self._counts: dict[str, int] = parent._counts if parent else {}

    def constant(self, value: Any, name: str | None = None) -> str:
        """Add a constant tensor; returns its name."""
        name = name or self._new("constant")
        self.initializers.append(self._onnx.numpy_helper.from_array(np.asarray(value), name))
        return name

    def add(self, op: str, *inputs: str, name: str | None = None, output: str | None = None, **attributes: Any) -> str:
        """Add a node; returns the name of its output, by default the node's own."""
        name = name or output or self._new(op)
        output = output or name
        self.nodes.append(self._onnx.helper.make_node(op, inputs, [output], name=name, **attributes))
        return output

    def cast(self, x: str, dtype: DTypeLike, output: str | None = None) -> str:
        """Add a type conversion."""
        return self.add("Cast", x, to=self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), output=output)

    def choose(self, condition: str, then: tuple["Nodes", str], other: tuple["Nodes", str]) -> str:
        """Add a conditional: the final value of one of two branches, the only one computed."""
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


@dataclasses.dataclass(frozen=True)
class _Value:
    """An activation (N, C, height, width), as a network's wiring takes it."""

    name: str
    size: tuple[int, int]
    nodes: Nodes

    def __add__(self, other: "_Value") -> "_Value":
        return self.then(self.nodes.add("Add", self.name, other.name))

    def then(self, name: str) -> "_Value":
        """The value `name`, of the same size."""
        return dataclasses.replace(self, name=name)


def add_network(nodes: Nodes, images: str, model: Network, size: tuple[int, int]) -> str:
    """Logits (N, K, h, w) of images (N, C, h, w) in [0, 1]."""
    layers = _NodeLayers(nodes, model, to_public(*split_state(model)[1:], dead_block=False))
    return layers.convolution(model.wire(layers, _Value(images, size, nodes)).name, "final_conv")


class _NodeLayers:
    """Add a network's parts to a graph, with normalisation folded into the convolutions."""

    def __init__(self, nodes: Nodes, model: Network, arrays: Mapping[str, np.ndarray]) -> None:
        self.nodes, self.model, self.arrays = nodes, model, arrays

    def convolution(self, x: str, name: str, norm: str | None = None, **attributes: int) -> str:
        """Add the convolution `name` with the normalisation `norm`, and zero padding that keeps the size."""
        dilation, stride = attributes.get("dilation", 1), attributes.get("stride", 1)
        kernel, bias = _folded(self.arrays, name, norm)
        reach = dilation * (kernel.shape[-1] // 2)
        shape: dict[str, Any] = {"kernel_shape": kernel.shape[2:], "dilations": [dilation] * 2, "strides": [stride] * 2}
        return self.nodes.add("Conv", x, *self._weights(name, kernel, bias), pads=[reach] * 4, name=name, **shape)

    def block(self, name: str, x: _Value) -> _Value:
        """Add a block, or a level of FusionNet."""
        part = getattr(self.model, name)
        public, dilation = part.name, part.dilation
        convolutions = [
            (f"{public}.{conv}", None if getattr(part, norm) is None else f"{public}.{norm}")
            for conv, norm in self.model.block_layers
        ]
        values = [x.name]
        for number, (conv, norm) in enumerate(convolutions, 1):
            last = number == len(convolutions)
            y = self.convolution(values[-1], conv, norm, dilation=dilation)
            if last and part.shortcut != "none":
                y = self.nodes.add("Add", y, values[0] if part.shortcut == "input" else values[1])
            y = self.nodes.add("Relu", y, name=public if last else None)
            if isinstance(part, Level) and number == len(convolutions) - 1:
                y = self.nodes.add("Add", values[1], y)
            values.append(y)
        return x.then(values[-1])

    def down(self, name: str, x: _Value) -> _Value:
        """Add max pooling, or a convolution with stride 2."""
        strided = self.model.config.down == "stride"
        if strided:
            y = self.convolution(x.name, name, stride=2)
        else:
            y = self.nodes.add("MaxPool", x.name, kernel_shape=[2, 2], strides=[2, 2])
        height, width = x.size
        return _Value(y, ((height + strided) // 2, (width + strided) // 2), self.nodes)

    def up(self, name: str, x: _Value, like: _Value) -> _Value:
        """Add a transposed convolution or bilinear resizing, cut or padded to the size of `like`."""
        nodes, part, conv = self.nodes, getattr(self.model, name), f"{name}.conv"
        norm = None if part.bnorm is None else f"{name}.bnorm"
        double = 2 * x.size[0], 2 * x.size[1]
        if part.method == "transposed":
            kernel, bias = _folded(self.arrays, conv, norm, transposed=True)
            extra = kernel.shape[-1] - 2
            y = nodes.add(
                "ConvTranspose", x.name, *self._weights(conv, kernel, bias), kernel_shape=kernel.shape[2:],
                strides=[2, 2], pads=[extra] * 4, output_padding=[extra] * 2, name=conv,
            )  # fmt: skip
        else:
            corners = "align_corners" if part.method == "bilinear_corners" else "half_pixel"
            batch_and_channels = nodes.add("Shape", x.name, start=0, end=2)
            sizes = nodes.add("Concat", batch_and_channels, nodes.constant(np.array(double)), axis=0)
            y = nodes.add("Resize", x.name, "", "", sizes, mode="linear", coordinate_transformation_mode=corners)
            y = self.convolution(y, conv, norm)
        y = nodes.add("Relu", y) if part.activated else y
        return like.then(self._matched(y, double, like.size))

    def join(self, x: _Value, y: _Value) -> _Value:
        """Add a concatenation of channels."""
        return x.then(self.nodes.add("Concat", x.name, y.name, axis=1))

    def _matched(self, x: str, size: tuple[int, int], target: tuple[int, int]) -> str:
        changes = [want - have for want, have in zip(target, size, strict=True)]
        if max(changes) > 0:
            x = self.nodes.add("Pad", x, self.nodes.constant(np.array([0] * 6 + [max(0, n) for n in changes])))
        if min(changes) < 0:
            ends = self.nodes.constant(np.array(target))
            x = self.nodes.add(
                "Slice", x, self.nodes.constant(np.array([0, 0])), ends, self.nodes.constant(np.array([2, 3]))
            )
        return x

    def _weights(self, name: str, kernel: np.ndarray, bias: np.ndarray) -> tuple[str, str]:
        return self.nodes.constant(kernel, f"{name}.weight"), self.nodes.constant(bias, f"{name}.bias")


def _folded(
    arrays: Mapping[str, np.ndarray], name: str, norm: str | None, transposed: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Kernel and bias, float32, of a convolution with the batch normalisation after it folded in."""
    kernel, bias = (arrays[f"{name}.{part}"].astype(np.float64) for part in ("weight", "bias"))
    if norm is not None:
        scale, shift, mean, var = (
            arrays[f"{norm}.{part}"].astype(np.float64) for part in ("weight", "bias", "running_mean", "running_var")
        )
        factor = scale / np.sqrt(var + EPSILON)
        outputs = (1, -1, 1, 1) if transposed else (-1, 1, 1, 1)
        kernel, bias = kernel * factor.reshape(outputs), (bias - mean) * factor + shift
    return kernel.astype(np.float32), bias.astype(np.float32)
