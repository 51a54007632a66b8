"""Read an optimised GPU program of XLA: kernel launches, bytes moved, floating-point operations, convolutions.

The figures are read off the program's text, not measured. Every kernel is taken to read its operands and to write its
results once; where a kernel reads only a slice of an operand, only the slice counts. Nothing is taken to stay in a
cache from one kernel to the next. Loops count as often as XLA says that they run.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "f32": 4}
BYTES |= {"s64": 8, "u64": 8, "f64": 8}

WIDEST_WINDOW = 7
"""Side of the largest window that a convolution of a network has. A larger one is an image in the place of a kernel."""

_NO_KERNEL = frozenset(
    ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id")
)
_ARRAY = re.compile(r"\b(\w+)\[([\d,]*)\]")
_HEAD = re.compile(r"(ENTRY )?%([\w.\-]+) .*\{$")
_LINE = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (.+)$")
_OP = re.compile(r"[\w\-]+\(")


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shape: str
    """Type of the result, as printed."""
    op: str
    operands: tuple[str, ...]
    """Names of the operands; the number of a parameter."""
    attributes: str
    root: bool

    def attribute(self, pattern: str) -> str | None:
        """The first group of `pattern` in the attributes."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else None


Computation = Mapping[str, Instruction]


@dataclass(frozen=True)
class Kernel:
    """A launch on the GPU."""

    kind: str
    """What is launched, in words: `convolution`, `fusion`, `all-reduce`, ..."""
    times: int
    bytes: int
    """Moved between the memory and the chip in one launch."""
    flops: int
    """2 for each multiply-add of convolutions and products; 0 for everything else."""


class Program:
    """A compiled program, from the text of its optimised HLO (`compiled.as_text()`)."""

    def __init__(self, text: str) -> None:
        self._computations, self._entry = _parse(text)
        self.windows = [int(side) for side in re.findall(r"window=\{size=(\d+)x", text)]
        """First side of the window of each convolution."""
        self.layouts = Counter(re.findall(r"dim_labels=([\w?]+)->", text))
        """Layouts of images and kernels of the convolutions, such as b01f_o01i."""
        self.targets = Counter(re.findall(r'custom_call_target="([^"]+)"', text))
        """Functions outside XLA that the program calls."""

    @cached_property
    def kernels(self) -> list[Kernel]:
        """Every launch, in the order of the program."""
        return list(self._walk(self._entry, 1))

    @property
    def launches(self) -> int:
        """Number of kernels launched."""
        return sum(kernel.times for kernel in self.kernels)

    @property
    def bytes(self) -> int:
        """Bytes moved by all launches."""
        return sum(kernel.times * kernel.bytes for kernel in self.kernels)

    @property
    def wide_windows(self) -> int:
        """Convolutions with an image in the place of a kernel."""
        return sum(side > WIDEST_WINDOW for side in self.windows)

    @property
    def all_reduces(self) -> int:
        """Sums over devices."""
        return sum(kernel.times for kernel in self.kernels if kernel.kind.startswith("all-reduce"))

    def seconds(self, bandwidth: float, flops: float) -> float:
        """Least time on a card with this memory bandwidth in bytes/s and this peak in flop/s, by the roofline model."""
        return sum(each.times * max(each.bytes / bandwidth, each.flops / flops) for each in self.kernels)

    def _walk(self, name: str, times: int) -> Iterator[Kernel]:
        computation = self._computations[name]
        for each in computation.values():
            if each.op in _NO_KERNEL or each.op.endswith("-done"):
                continue
            if each.op == "while":
                trips = int(each.attribute(r'"known_trip_count":\{"n":"(\d+)"\}') or 1)
                for part in ("body", "condition"):
                    yield from self._walk(str(each.attribute(rf"{part}=%?([\w.\-]+)")), times * trips)
            elif each.op in ("call", "conditional"):
                for called in re.findall(r"(?:to_apply|_computation)=%?([\w.\-]+)", each.attributes):
                    yield from self._walk(called, times)
            elif each.op == "fusion":
                called = self._computations[str(each.attribute(r"calls=%?([\w.\-]+)"))]
                yield Kernel("fusion", times, _fusion_bytes(called), self._product_flops(called))
            else:
                moved = sum(_nbytes(computation[name].shape) for name in each.operands if name in computation)
                flops, kind = 0, each.op
                if each.op == "custom-call":
                    kind = each.attribute(r'custom_call_target="([^"]+)"') or kind
                    flops = _call_flops(kind, each, computation)
                yield Kernel(kind, times, moved + _nbytes(each.shape), flops)

    def _product_flops(self, computation: Computation) -> int:
        flops = 0
        for each in computation.values():
            if each.op == "dot":
                left = _dimensions(computation[each.operands[0]].shape)
                summed = (each.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or "").split(",")
                flops += 2 * math.prod(_dimensions(each.shape)) * math.prod(left[int(axis)] for axis in summed if axis)
            elif called := each.attribute(r"(?:calls|to_apply)=%?([\w.\-]+)"):
                flops += self._product_flops(self._computations[called])
        return flops


def _parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """The computations of a program by name, and the name of the first one to run."""
    computations: dict[str, dict[str, Instruction]] = {}
    current: dict[str, Instruction] = {}
    entry = ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif match := _LINE.match(line):
            root, name, rest = match.groups()
            shape, rest = _split(rest) if rest.startswith("(") else rest.split(" ", 1)
            op = _OP.match(rest.lstrip())
            if op is None:
                continue
            arguments, attributes = _split(rest.lstrip()[op.end() - 1 :])
            kind = op[0][:-1]
            operands = [arguments[1:-1]] if kind == "parameter" else re.findall(r"%([\w.\-]+)", arguments)
            current[name] = Instruction(name, shape, kind, tuple(operands), attributes, bool(root))
    return computations, entry


def _split(text: str) -> tuple[str, str]:
    """Split a text that begins with a parenthesis behind the one that closes it."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[: place + 1], text[place + 1 :]
    return text, ""


def _dimensions(shape: str) -> list[int]:
    """Dimensions of the first array of a printed type."""
    match = _ARRAY.search(shape)
    return [int(side) for side in match[2].split(",") if side] if match else []


def _nbytes(shape: str) -> int:
    """Bytes of all arrays of a printed type."""
    sizes = ((kind, math.prod(int(side) for side in sides.split(",") if side)) for kind, sides in _ARRAY.findall(shape))
    return sum(BYTES.get(kind, 0) * count for kind, count in sizes)


def _fusion_bytes(body: Computation) -> int:
    """Bytes that a fused kernel reads and writes."""
    users: dict[str, list[tuple[Instruction, int]]] = defaultdict(list)
    for each in body.values():
        if each.op != "parameter":
            for place, operand in enumerate(each.operands):
                users[operand].append((each, place))

    def read(name: str) -> int:
        """Elements that the users of a value read of it."""
        everything, total = math.prod(_dimensions(body[name].shape)), 0
        for user, place in users[name]:
            if user.op in ("slice", "dynamic-slice", "gather") and place == 0:
                total += math.prod(_dimensions(user.shape))
            elif user.op in ("bitcast", "convert"):
                total += read(user.name)
            elif user.op != "dynamic-update-slice" or place != 0:  # which writes its first operand in place
                return everything
        return min(total, everything)

    def written(name: str) -> int:
        while body[name].op == "bitcast" and body[name].operands[0] in body:
            name = body[name].operands[0]
        if body[name].op == "dynamic-update-slice":
            return _nbytes(body[body[name].operands[1]].shape)
        return _nbytes(body[name].shape)

    root = next(each for each in body.values() if each.root)
    results = root.operands if root.op == "tuple" else (root.name,)
    parameters = [(name, _ARRAY.search(each.shape)) for name, each in body.items() if each.op == "parameter"]
    reads = sum(read(name) * BYTES.get(shape[1], 0) for name, shape in parameters if shape)
    return reads + sum(map(written, results))


def _call_flops(target: str, call: Instruction, computation: Computation) -> int:
    """Operations of a convolution of cuDNN, a product of cuBLAS or a kernel of `model.fast.pallas`."""
    shapes = [_dimensions(computation[name].shape) for name in call.operands if name in computation]
    out = _dimensions(call.shape)
    if target.startswith("__cudnn$conv"):
        labels = call.attribute(r"dim_labels=\w+_(\w+)->") or "01io"
        # Images, or their gradient, and the kernel, or its gradient: each output channel of each pixel sums over the
        # taps and the input channels.
        images, kernel = (
            (shapes[1], out) if "Filter" in target else (out if "Forward" in target else shapes[0], shapes[1])
        )
        return 2 * math.prod(images) * math.prod(kernel) // kernel[labels.index("o")]
    if target.endswith("triton"):
        # The package's own kernels, by their operands: the needed multiplications, without those of masked channels.
        kernel = next((shape for shape in shapes if len(shape) == 4 and shape[:2] == [3, 3]), [0])
        results = [_dimensions(f"{kind}[{sides}]") for kind, sides in _ARRAY.findall(call.shape)]
        passes = 2 if any(each[1:] == [9, *kernel[2:]] for each in results) else 1  # gradients of input and filters
        return 2 * passes * math.prod(out[:3]) * math.prod(kernel)
    if "cublas" in target and len(shapes) > 1:
        axis = call.attribute(r'"lhs_contracting_dimensions":\["(\d+)"\]')
        return 2 * math.prod(out) * (shapes[0][int(axis)] if axis else 1)
    return 0
