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
    """A graph under construction.

    Attributes:
        nodes: Nodes in the order they were added.
        initializers: Constants, including the weights.
    """

    def __init__(self, onnx: ModuleType) -> None:
        self._onnx = onnx
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self._counts: dict[str, int] = {}

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

    def _new(self, kind: str) -> str:
        self._counts[kind] = self._counts.get(kind, 0) + 1
        return f"{kind}_{self._counts[kind]}"


@dataclasses.dataclass(frozen=True)
class _Value:
    """An activation (N, C, height, width), as a network's wiring takes it."""

    name: str
    size: tuple[int, int] | None
    """None if only a runtime knows it."""
    nodes: Nodes

    def __add__(self, other: "_Value") -> "_Value":
        return self.then(self.nodes.add("Add", self.name, other.name))

    def then(self, name: str) -> "_Value":
        """The value `name`, of the same size."""
        return dataclasses.replace(self, name=name)


def add_network(nodes: Nodes, images: str, model: Network, size: tuple[int, int] | None) -> str:
    """Logits (N, K, h, w) of images (N, C, h, w) in [0, 1]; `size` is (h, w), or None if only a runtime knows it."""
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
        half = x.size and ((x.size[0] + strided) // 2, (x.size[1] + strided) // 2)
        return _Value(y, half, self.nodes)

    def up(self, name: str, x: _Value, like: _Value) -> _Value:
        """Add a transposed convolution or bilinear resizing, cut or padded to the size of `like`."""
        nodes, part, conv = self.nodes, getattr(self.model, name), f"{name}.conv"
        norm = None if part.bnorm is None else f"{name}.bnorm"
        if part.method == "transposed":
            kernel, bias = _folded(self.arrays, conv, norm, transposed=True)
            extra = kernel.shape[-1] - 2
            y = nodes.add(
                "ConvTranspose", x.name, *self._weights(conv, kernel, bias), kernel_shape=kernel.shape[2:],
                strides=[2, 2], pads=[extra] * 4, output_padding=[extra] * 2, name=conv,
            )  # fmt: skip
        else:
            corners = "align_corners" if part.method == "bilinear_corners" else "half_pixel"
            double = nodes.constant(np.array([1, 1, 2, 2], np.float32))
            y = nodes.add("Resize", x.name, "", double, mode="linear", coordinate_transformation_mode=corners)
            y = self.convolution(y, conv, norm)
        y = nodes.add("Relu", y) if part.activated else y
        return like.then(self._matched(y, x.size, like))

    def join(self, x: _Value, y: _Value) -> _Value:
        """Add a concatenation of channels."""
        return x.then(self.nodes.add("Concat", x.name, y.name, axis=1))

    def _matched(self, y: str, half: tuple[int, int] | None, like: _Value) -> str:
        """Cut or pad `y`, twice as large as `half`, to the size of `like`, from which it differs by one at most."""
        nodes, axes = self.nodes, self.nodes.constant(np.array([2, 3]))
        if half and like.size:
            changes = [want - 2 * have for want, have in zip(like.size, half, strict=True)]
            ends = nodes.constant(np.array(like.size))
        else:
            changes, ends = [], nodes.add("Shape", like.name, start=2, end=4)
        if not changes or max(changes) > 0:
            more = [max(0, change) for change in changes or (1, 1)]
            y = nodes.add("Pad", y, nodes.constant(np.array([0] * 6 + more)))
        if not changes or min(changes) < 0:
            y = nodes.add("Slice", y, nodes.constant(np.array([0, 0])), ends, axes)
        return y

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
