"""Pillow's bilinear resize as ONNX nodes, in integers: see `stablehlo.py` for the weights.

From s to t pixels, with m = max(s, t), target i weighs source j by n / sum(n) with the whole number
n = max(0, 2m - |(2j + 1) t - (2i + 1) s|). A long division gives the weight's 22 bits as three digits that fit into
uint8, and each pass multiplies 8-bit pixels by them. Runtimes that compute in float32 where the graph says float64, or
in bfloat16 where it says float32, leave integers alone, so that every one sees the same pixels.
"""

from typing import NamedTuple

import numpy as np

from pdrunet_jax.export.stablehlo import FIXED_POINT
from pdrunet_jax.model.onnx_network import Nodes

DIGITS = (7, 8, 7)
"""Bits of a weight's digits, `FIXED_POINT` in total. A weight of 1, and a last digit rounded up, take a bit more."""

assert sum(DIGITS) == FIXED_POINT


class Span(NamedTuple):
    """One axis of the rectangle that the image fills, as in `stablehlo.Span`: names of int64 scalars."""

    side: str
    start: str
    length: str


def span_image(nodes: Nodes, shape: tuple[str, str], size: tuple[int, int], fit: str) -> tuple[Span, Span]:
    """Rows and columns of the rectangle of an image in an input of `size`, `data.fit.Fit.box`.

    `shape` names the image's height and width, int64 scalars.
    """
    height, width = shape
    sides = [nodes.constant(np.int64(side)) for side in size]
    zero, one, two = (nodes.constant(np.int64(value)) for value in (0, 1, 2))
    if fit == "stretch":
        return Span(sides[0], zero, sides[0]), Span(sides[1], zero, sides[1])

    def scaled(side: str, numerator: str, denominator: str) -> str:
        doubled = nodes.add("Mul", two, nodes.add("Mul", side, numerator))
        quotient = nodes.add("Div", nodes.add("Add", doubled, denominator), nodes.add("Mul", two, denominator))
        return nodes.add("Max", quotient, one)

    products = nodes.add("Mul", sides[0], width), nodes.add("Mul", sides[1], height)
    tall = nodes.add("LessOrEqual", *products)
    rows = nodes.add("Where", tall, sides[0], scaled(height, sides[1], width))
    columns = nodes.add("Where", tall, scaled(width, sides[0], height), sides[1])
    starts = [nodes.add("Div", nodes.add("Sub", *each), two) for each in zip(sides, (rows, columns), strict=True)]
    return Span(sides[0], starts[0], rows), Span(sides[1], starts[1], columns)


def resize_images(
    nodes: Nodes, images: str, shape: tuple[str, str], spans: tuple[Span, Span], *, tall_first: bool
) -> str:
    """Resize images (N, C, H, W), uint8, into the rectangle `spans` exactly as Pillow does; black outside it.

    `shape` names H and W, int64 scalars; `tall_first` as in `GraphSpec`.
    """
    rows = _digits(nodes, *_weights_in(nodes, shape[0], spans[0]))
    columns = _digits(nodes, *_weights_in(nodes, shape[1], spans[1], transposed=True))

    def horizontal(x: str) -> str:
        return _rounded(nodes, [nodes.add("MatMulInteger", x, digit) for digit in columns])

    def vertical(x: str) -> str:
        return _rounded(nodes, [nodes.add("MatMulInteger", digit, x) for digit in rows])

    if not tall_first:
        return vertical(horizontal(images))
    shrunk = [nodes.add("Sub", side, span.length) for side, span in zip(shape, spans, strict=True)]
    zero = nodes.constant(np.int64(0))
    limit = nodes.add("Max", nodes.add("Mul", shrunk[1], nodes.constant(np.int64(2))), zero)
    tall = nodes.cast(nodes.add("Greater", shrunk[0], limit), np.int64)
    # Either all images or none go each way. OpenVINO computes nonsense at the first call of a graph with an If.
    axis, start, end = (nodes.constant(np.array([value])) for value in (0, 0, np.iinfo(np.int64).max))
    count = nodes.add("Shape", images, start=0, end=1)
    cut = nodes.add("Mul", count, tall)
    first, rest = nodes.add("Slice", images, start, cut, axis), nodes.add("Slice", images, cut, end, axis)
    return nodes.add("Concat", horizontal(vertical(first)), vertical(horizontal(rest)), axis=0)


def resize_probability(nodes: Nodes, probability: str, shape: tuple[str, str], spans: tuple[Span, Span]) -> str:
    """Resize the rectangle in (N, K, height, width), float32, to (N, K, H, W); arguments as for `resize_images`."""
    rows = _quotients(nodes, *_weights_out(nodes, spans[0], shape[0]))
    columns = _quotients(nodes, *_weights_out(nodes, spans[1], shape[1], transposed=True))
    return nodes.add("MatMul", rows, nodes.add("MatMul", probability, columns))


def _weights_in(nodes: Nodes, source: str, into: Span, *, transposed: bool = False) -> tuple[str, str]:
    """Weights (into.side, source); zero for targets outside the span. See `_weights`."""
    targets = nodes.add("Sub", _range(nodes, into.side), into.start)
    return _weights(nodes, _range(nodes, source), targets, source, into.length, transposed=transposed)


def _weights_out(nodes: Nodes, of: Span, target: str, *, transposed: bool = False) -> tuple[str, str]:
    """Weights (target, of.side); zero for sources outside the span. See `_weights`."""
    sources = nodes.add("Sub", _range(nodes, of.side), of.start)
    return _weights(nodes, sources, _range(nodes, target), of.length, target, transposed=transposed)


def _weights(
    nodes: Nodes, sources: str, targets: str, source: str, target: str, *, transposed: bool
) -> tuple[str, str]:
    """Numerators (targets, sources) of the weights from `source` to `target` pixels, and denominators (targets, 1).

    All are int64. `sources` and `targets` are the pixels' places; those outside weigh nothing.
    """
    zero, one, two = (nodes.constant(np.int64(value)) for value in (0, 1, 2))
    across, along = (nodes.constant(np.array([axis])) for axis in ((1, 0) if transposed else (0, 1)))

    def spread(places: str, count: str, other: str, axis: str) -> tuple[str, str]:
        """Places in units of 1 / (2 source target), and whether they are from 0 to below `count`."""
        middle = nodes.add("Mul", nodes.add("Add", nodes.add("Mul", places, two), one), other)
        inside = nodes.add("And", nodes.add("GreaterOrEqual", places, zero), nodes.add("Less", places, count))
        return nodes.add("Unsqueeze", middle, axis), nodes.add("Unsqueeze", inside, axis)

    positions, known = spread(sources, source, target, across)
    centres, wanted = spread(targets, target, source, along)
    distance = nodes.add("Abs", nodes.add("Sub", positions, centres))
    reach = nodes.add("Mul", nodes.add("Max", source, target), two)
    numerators = nodes.add("Max", nodes.add("Sub", reach, distance), zero)
    numerators = nodes.add("Where", nodes.add("And", known, wanted), numerators, zero)
    total = nodes.add("ReduceSum", numerators, along, keepdims=1)
    return numerators, nodes.add("Max", total, one)  # outside, they are 0 / 0


def _range(nodes: Nodes, stop: str) -> str:
    """0, 1, ... below an int64 scalar."""
    return nodes.add("Range", nodes.constant(np.int64(0)), stop, nodes.constant(np.int64(1)))


def _quotients(nodes: Nodes, numerators: str, denominators: str) -> str:
    """Weights in float32."""
    return nodes.add("Div", nodes.cast(numerators, np.float32), nodes.cast(denominators, np.float32))


def _digits(nodes: Nodes, numerators: str, denominators: str) -> list[str]:
    """Digits of the weights in fixed point, the highest first, uint8."""
    digits, rest = [], numerators
    for bits in DIGITS[:-1]:
        scaled = nodes.add("Mul", rest, nodes.constant(np.int64(2**bits)))
        digit, rest = _long_division(nodes, scaled, denominators)
        digits.append(digit)
    doubled = nodes.add("Mul", rest, nodes.constant(np.int64(2 ** (DIGITS[-1] + 1))))
    half_up = nodes.add("Add", doubled, denominators)
    digits.append(_long_division(nodes, half_up, nodes.add("Add", denominators, denominators))[0])
    return [nodes.cast(digit, np.uint8) for digit in digits]


def _long_division(nodes: Nodes, x: str, by: str) -> tuple[str, str]:
    """Quotient and remainder of whole numbers at least 0, int64.

    OpenVINO divides in float32: from 2^24 on, its quotient may be off by one, which the remainder shows.
    """
    quotient = nodes.add("Div", x, by)
    rest = nodes.add("Sub", x, nodes.add("Mul", quotient, by))
    more = nodes.cast(nodes.add("GreaterOrEqual", rest, by), np.int64)
    less = nodes.cast(nodes.add("Less", rest, nodes.constant(np.int64(0))), np.int64)
    change = nodes.add("Sub", more, less)
    return nodes.add("Add", quotient, change), nodes.add("Sub", rest, nodes.add("Mul", change, by))


def _rounded(nodes: Nodes, sums: list[str]) -> str:
    """Grey values, uint8, of the sums for each digit, int32: their total in fixed point, rounded half up."""
    high, middle, total = sums
    for higher, bits in ((middle, DIGITS[2]), (high, DIGITS[1])):
        total = nodes.add("Add", higher, _shifted(nodes, total, bits))
    total = nodes.add("Add", total, nodes.constant(np.int32(2 ** (DIGITS[0] - 1))))
    return nodes.cast(_shifted(nodes, total, DIGITS[0]), np.uint8)


def _shifted(nodes: Nodes, x: str, bits: int) -> str:
    """Whole numbers without their last bits.

    The division leaves no remainder: OpenVINO may merge it into the product before and not cut a fraction off.
    """
    by = nodes.constant(np.int32(2**bits))
    return nodes.add("Div", nodes.add("Sub", x, nodes.add("Mod", x, by)), by)
