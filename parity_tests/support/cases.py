"""The networks of levels 3, 5 and 6 and their passes, each computed once."""

import itertools
from functools import cache

from parity_tests.support import harness, jax_side, torch_side
from parity_tests.support.case import Arrays, Case, Pass
from parity_tests.support.pair import our_pair
from pdrunet_jax.model.execution import custom_calls
from pdrunet_jax.model.layers import PATHS

DTYPES = ("float64", "float32")

HERE = (*PATHS, *(("native",) if custom_calls() else ()))
"""Paths that run on this computer; the native one needs a C++ compiler."""

ODD = (1, 97, 61)
SMALL = (3, 20, 12)  # both sides are smaller than the largest dilation, 32, and one than 16

_COMPILED = (
    Case(),
    Case(outputs=2, shortcut="conv1"),
    Case(outputs=5, norm="none", in_channels=3),
    Case(norm="none", shortcut="conv1", shape=SMALL),
    Case(outputs=2, in_channels=3, shape=ODD),
    Case(outputs=5, shortcut="conv1", in_channels=3, shape=SMALL),
    Case(filters=40, shape=(1, 12, 20)),
    Case(path="polyphase"),
    Case(path="fused"),
    Case(path="fused", shortcut="conv1", outputs=2, in_channels=3),
    Case(path="fused", norm="none", shape=SMALL),
    *(
        case
        for case in (
            Case(path="native", outputs=2, in_channels=3, shape=ODD),
            Case(path="native", shortcut="conv1", filters=11, shape=SMALL),
            Case(path="native", norm="none", shape=SMALL),
        )
        if case.path in HERE
    ),
)

BASELINES = tuple(
    Case(network=network, filters=3, **options, path=path)
    for network in ("unet", "fusionnet")
    for path, options in (
        ("plain", {"shape": (2, 21, 14), "outputs": 2}),
        ("fused", {"shape": (2, 21, 14), "down": "stride", "up": "bilinear_corners", "in_channels": 3}),
        ("fused", {"shape": (1, 16, 11), "up": "bilinear", "norm": "none", "outputs": 5}),
        ("plain", {"shape": (1, 13, 16), "down": "stride", "depth": 1}),
        ("native", {"shape": (2, 21, 14), "outputs": 2}),
    )
    if path in HERE
)
"""U-Net and FusionNet: every way to halve and to double the resolution, on sides that it does not divide."""

_NATIVE = tuple(case for case in (*_COMPILED[11:12], *BASELINES) if case.path == "native")

# Float32 shows rounding only: the default network, the public width, no normalisation, and each path.
_ROUNDED = (_COMPILED[0], _COMPILED[2], _COMPILED[6], _COMPILED[7], _COMPILED[8], BASELINES[0], *_NATIVE)

CASES = (*_COMPILED, *BASELINES, *(case.replace(dtype="float32") for case in _ROUNDED))
"""Compiled as one program, as in production: a selection of options, the public code's width, and each path."""

_COMBINATIONS = (
    Case(shortcut=shortcut, norm=norm, in_channels=channels, outputs=outputs, shape=shape)
    for shape, shortcut, norm, channels, outputs in itertools.product(
        (ODD, SMALL), ("input", "conv1"), ("batch", "none"), (1, 3), (1, 2, 5)
    )
    if shape == SMALL or ((shortcut == "conv1") + (norm == "none") + (channels == 3)) % 2 == 0
)

SWEEP = tuple(case for case in _COMBINATIONS if case not in CASES)
"""All other combinations of the options on small sizes, and half of them on odd sizes: every pair of options is there.

Computed operation by operation."""


def state_of(case: Case) -> Arrays:
    """The twin's arrays for this case, by public name."""
    return torch_side.state_arrays(torch_side.make_twin(case))


@cache
def eval_passes(case: Case) -> tuple[Pass, Pass]:
    """A pass in evaluation mode, in JAX and in PyTorch."""
    pair = our_pair(case)
    return harness.forward(pair, False, how=_how(case)), harness.original(pair, False)


@cache
def train_passes(case: Case) -> tuple[Pass, Pass]:
    """A pass in training mode with injected dropout masks, the default loss and all gradients, in both frameworks."""
    pair = our_pair(case)
    return harness.forward(pair, True, how=_how(case), loss=True), harness.original(pair, True, loss=True)


def _how(case: Case) -> jax_side.How:
    if case in SWEEP:
        return "op by op"
    # As in production where that compiles fast, at least once a path; see `jax_side.compiled`.
    ordinary = case.dtype == "float32" and case.shape == Case.shape and case.outputs == 1
    return "optimised" if ordinary and case.path != "polyphase" else "compiled"
