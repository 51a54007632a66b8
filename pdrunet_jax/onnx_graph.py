"""The network as an ONNX graph, made node by node under the public names: from uint8 images to masks of their size."""

import importlib
import json
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np
from flax import nnx

from pdrunet_jax.errors import UserError
from pdrunet_jax.fused import EPSILON
from pdrunet_jax.model import Block, PDRUNet
from pdrunet_jax.onnx_nodes import Nodes
from pdrunet_jax.onnx_resize import resize_images, restore
from pdrunet_jax.weights import to_public

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
