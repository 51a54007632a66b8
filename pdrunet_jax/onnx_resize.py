"""Pillow's bilinear `resize` in an ONNX graph: weights made from the image's size, and a product for each axis."""

import numpy as np

from pdrunet_jax.onnx_nodes import Nodes
from pdrunet_jax.resampling import FIXED_POINT


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
