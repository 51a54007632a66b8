"""Export to ONNX: a graph from uint8 images to masks of the same size, built node by node under the public names.

Images are resized exactly as Pillow does (see `stablehlo.py`): the weights are computed from the image's size and
applied as one matrix product per axis. Padding is part of these matrices, as there.
"""

import importlib
import json
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import numpy as np

from pdrunet_jax.export.stablehlo import FIXED_POINT, GraphSpec
from pdrunet_jax.model.base import Network
from pdrunet_jax.model.onnx_network import IR_VERSION, OPSET, Nodes, add_network
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.extras import how_to_install


def build_onnx(model: Network, spec: GraphSpec) -> bytes:
    """Serialise a float32 model; the metadata become `metadata_props`, as JSON unless they are strings.

    Raises `UserError` if the package onnx is missing.
    """
    onnx = require("onnx")
    helper, types = onnx.helper, onnx.TensorProto
    nodes = Nodes(onnx)
    single = model.outputs == 1

    # From pixels to logits.
    shape = nodes.add("Shape", "images")
    height, width = (nodes.add("Gather", shape, nodes.constant(np.int64(axis))) for axis in (1, 2))
    channels_first = nodes.add("Transpose", "images", perm=[0, 3, 1, 2])
    spans = _box(nodes, height, width, spec)
    pixels = _resize_images(nodes, channels_first, (height, width), spans, spec)
    unit = nodes.add("Div", nodes.cast(pixels, np.float32), nodes.constant(np.float32(255)))
    logits = add_network(nodes, unit, model, spec.size)
    nodes.add("Transpose", logits, perm=[0, 2, 3, 1], output="logits")

    # From logits to the mask.
    sigmoid = single or model.multilabel
    small = nodes.add("Sigmoid", logits) if sigmoid else nodes.add("Softmax", logits, axis=1)
    large = _resize_probability(nodes, small, spans, (height, width))
    if single:
        nodes.add("Squeeze", large, nodes.constant(np.array([1])), output="probability")
        classes = nodes.add("Greater", "probability", nodes.constant(np.asarray(spec.threshold, np.float32)))
    else:
        nodes.add("Transpose", large, perm=[0, 2, 3, 1], output="probability")
    if model.multilabel:
        classes = nodes.add("Greater", "probability", nodes.constant(np.asarray(spec.threshold, np.float32)))
    elif not single:
        classes = nodes.add("ArgMax", "probability", axis=-1, keepdims=0)
    nodes.cast(classes, np.uint8, output="mask")

    # The file.
    value_info = helper.make_tensor_value_info
    images = value_info("images", types.UINT8, ["N", "H", "W", model.config.in_channels])
    outputs = [
        value_info("mask", types.UINT8, ["N", "H", "W", *([model.outputs] if model.multilabel else [])]),
        value_info("probability", types.FLOAT, ["N", "H", "W", *([] if single else [model.outputs])]),
        value_info("logits", types.FLOAT, ["N", *spec.size, model.outputs]),
    ]
    proto = helper.make_model(
        helper.make_graph(nodes.nodes, "pdrunet", [images], outputs, initializer=nodes.initializers),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="pdrunet-jax",
        producer_version=str(spec.metadata.get("version", "")),
    )
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in spec.metadata.items()}
    helper.set_model_props(proto, texts)
    onnx.checker.check_model(proto, full_check=True)
    return bytes(proto.SerializeToString())


def open_onnx(data: bytes) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Load a graph in onnxruntime on the CPU: a function from images to outputs by name.

    Raises `UserError` if the package onnxruntime is missing.
    """
    runtime = require("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors only; the warnings concern the machine
    session = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(names, session.run(names, {"images": images}), strict=True))

    return run


def require(package: str, form: str = "onnx") -> ModuleType:
    """Import a package of the extra `export`, for `--format` `form`. Raises `UserError` if it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"--format {form} needs {package}: {how_to_install('export')}") from None


class _Span(NamedTuple):
    """One axis of the rectangle that the image fills, as in `stablehlo.Span`: names of int64 scalars."""

    side: str
    start: str
    length: str


def _box(nodes: Nodes, height: str, width: str, spec: GraphSpec) -> tuple[_Span, _Span]:
    """Rows and columns of the rectangle of an image, `data.fit.Fit.box`; `height` and `width` are int64 scalars."""
    sides = [nodes.constant(np.int64(side)) for side in spec.size]
    zero, one, two = (nodes.constant(np.int64(value)) for value in (0, 1, 2))
    if spec.fit == "stretch":
        return _Span(sides[0], zero, sides[0]), _Span(sides[1], zero, sides[1])

    def scaled(side: str, numerator: str, denominator: str) -> str:
        doubled = nodes.add("Mul", two, nodes.add("Mul", side, numerator))
        quotient = nodes.add("Div", nodes.add("Add", doubled, denominator), nodes.add("Mul", two, denominator))
        return nodes.add("Max", quotient, one)

    products = nodes.add("Mul", sides[0], width), nodes.add("Mul", sides[1], height)
    tall = nodes.add("LessOrEqual", *products)
    rows = nodes.add("Where", tall, sides[0], scaled(height, sides[1], width))
    columns = nodes.add("Where", tall, scaled(width, sides[0], height), sides[1])
    starts = [nodes.add("Div", nodes.add("Sub", *each), two) for each in zip(sides, (rows, columns), strict=True)]
    return _Span(sides[0], starts[0], rows), _Span(sides[1], starts[1], columns)


def _resize_images(
    nodes: Nodes, images: str, shape: tuple[str, str], spans: tuple[_Span, _Span], spec: GraphSpec
) -> str:
    """Resize images (N, C, H, W), uint8, to `spec.size` exactly as Pillow does; float64 holding whole grey values.

    `shape` names H and W, int64 scalars; black outside the rectangle `spans`.
    """
    rows = _fixed_point(nodes, _weights_in(nodes, shape[0], spans[0]))
    columns = _fixed_point(nodes, _weights_in(nodes, shape[1], spans[1], transposed=True))
    pixels = nodes.cast(images, np.float64)  # exact: all sums of the two products are integers below 2^53

    def horizontal(nodes: Nodes, x: str) -> str:
        return _rounded(nodes, nodes.add("MatMul", x, columns))

    def vertical(nodes: Nodes, x: str) -> str:
        return _rounded(nodes, nodes.add("MatMul", rows, x))

    if not spec.tall_first:
        return vertical(nodes, horizontal(nodes, pixels))
    shrunk = [nodes.add("Sub", side, span.length) for side, span in zip(shape, spans, strict=True)]
    twice = nodes.add("Mul", shrunk[1], nodes.constant(np.int64(2)))
    limit = nodes.add("Max", twice, nodes.constant(np.int64(0)))
    then, other = nodes.branch(), nodes.branch()
    first_vertical = horizontal(then, vertical(then, pixels))
    first_horizontal = vertical(other, horizontal(other, pixels))
    tall = nodes.add("Greater", shrunk[0], limit)
    return nodes.choose(tall, (then, first_vertical), (other, first_horizontal))


def _resize_probability(nodes: Nodes, probability: str, spans: tuple[_Span, _Span], shape: tuple[str, str]) -> str:
    """Resize the rectangle in (N, K, height, width), float32, to (N, K, H, W); arguments as for `_resize_images`."""
    rows = nodes.cast(_weights_out(nodes, spans[0], shape[0]), np.float32)
    columns = nodes.cast(_weights_out(nodes, spans[1], shape[1], transposed=True), np.float32)
    return nodes.add("MatMul", rows, nodes.add("MatMul", probability, columns))


def _weights_in(nodes: Nodes, source: str, into: _Span, *, transposed: bool = False) -> str:
    """Resize weights (into.side, source); zero outside the span. See `_weights`."""
    at = nodes.add("Sub", _range(nodes, into.side), nodes.cast(into.start, np.float64))
    weights = _weights(nodes, _range(nodes, source), at, source, into.length, transposed=transposed)
    axis = nodes.constant(np.array([0 if transposed else 1]))
    inside = nodes.add("Unsqueeze", _inside(nodes, at, into.length), axis)
    return nodes.add("Where", inside, weights, nodes.constant(np.float64(0)))  # outside they are 0 / 0


def _weights_out(nodes: Nodes, of: _Span, target: str, *, transposed: bool = False) -> str:
    """Resize weights (target, of.side); zero for sources outside the span. See `_weights`."""
    sources = nodes.add("Sub", _range(nodes, of.side), nodes.cast(of.start, np.float64))
    return _weights(nodes, sources, _range(nodes, target), of.length, target, transposed=transposed)


def _inside(nodes: Nodes, at: str, length: str) -> str:
    """Whether places, float64, are from 0 to below `length`."""
    bounds = nodes.add("GreaterOrEqual", at, nodes.constant(np.float64(0)))
    below = nodes.add("Less", at, nodes.cast(length, np.float64))
    return nodes.add("And", bounds, below)


def _weights(nodes: Nodes, sources: str, targets: str, source: str, target: str, *, transposed: bool) -> str:
    """Resize weights (targets, sources), float64, unrounded, from `source` to `target` pixels.

    `sources` and `targets` are the pixels' places, float64; sources outside weigh nothing. The transposed matrix is
    built directly: onnxruntime merges `Transpose` and `MatMul` into a node that some of its versions lack for float64.
    """
    zero, half, one = (nodes.constant(np.float64(value)) for value in (0, 0.5, 1))
    first, last = nodes.constant(np.array([0])), nodes.constant(np.array([1]))
    source_axis, target_axis = (last, first) if transposed else (first, last)  # axes to insert next to each
    scale = nodes.add("Div", nodes.cast(source, np.float64), nodes.cast(target, np.float64))
    narrower = nodes.add("Div", one, nodes.add("Max", scale, one))
    centres = nodes.add("Mul", nodes.add("Add", targets, half), scale)
    positions = nodes.add("Unsqueeze", sources, source_axis)
    offset = nodes.add("Sub", positions, nodes.add("Unsqueeze", centres, target_axis))
    distance = nodes.add("Abs", nodes.add("Mul", nodes.add("Add", offset, half), narrower))
    weights = nodes.add("Max", nodes.add("Sub", one, distance), zero)
    inside = nodes.add("Unsqueeze", _inside(nodes, sources, source), source_axis)
    weights = nodes.add("Where", inside, weights, zero)
    return nodes.add("Div", weights, nodes.add("ReduceSum", weights, target_axis, keepdims=1))


def _range(nodes: Nodes, stop: str) -> str:
    """0, 1, ... below an int64 scalar, as float64."""
    return nodes.cast(nodes.add("Range", nodes.constant(np.int64(0)), stop, nodes.constant(np.int64(1))), np.float64)


def _fixed_point(nodes: Nodes, weights: str) -> str:
    scaled = nodes.add("Mul", weights, nodes.constant(np.float64(2**FIXED_POINT)))
    return nodes.add("Floor", nodes.add("Add", scaled, nodes.constant(np.float64(0.5))))


def _rounded(nodes: Nodes, sums: str) -> str:
    """Fixed-point sums of grey values, rounded to whole grey values."""
    halved = nodes.add("Add", sums, nodes.constant(np.float64(2 ** (FIXED_POINT - 1))))
    return nodes.add("Floor", nodes.add("Mul", halved, nodes.constant(np.float64(2.0**-FIXED_POINT))))
