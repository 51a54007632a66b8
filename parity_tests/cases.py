"""The networks that levels 3, 5 and 6 are held on, and their passes, computed once."""

from functools import cache

import jax.numpy as jnp

from parity_tests.pairs import (
    Case,
    Pass,
    jax_pass,
    make_flax,
    make_images,
    make_masks,
    make_target,
    make_twin,
    torch_pass,
    torch_target,
)
from pdrunet_jax.config import LossConfig
from pdrunet_jax.losses import make_loss
from pdrunet_torch_ref import training

DTYPES = ("float64", "float32")

ODD = (1, 97, 61)
SMALL = (3, 20, 12)  # both sides are smaller than the largest dilations, 16 and 32

_SWEEP = (
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
)

CASES = tuple(case.replace(dtype=dtype) for case in _SWEEP for dtype in DTYPES)
"""Both shortcuts, with and without normalisation, 1 and 3 channels, 1, 2 and 5 outputs, batch 1 to 3, odd and small
sizes, the public code's width, and each execution path; in both dtypes."""


@cache
def eval_passes(case: Case) -> tuple[Pass, Pass]:
    """A pass in evaluation mode in JAX and in PyTorch."""
    twin, images = make_twin(case), make_images(case)
    got = jax_pass(make_flax(twin, case), images, train=False, optimised=case.optimised)
    return got, torch_pass(twin, images, train=False)


@cache
def train_passes(case: Case) -> tuple[Pass, Pass]:
    """A pass in training mode with injected dropout masks, its default loss and all gradients, in both."""
    twin, images, masks = make_twin(case), make_images(case), make_masks(case)
    target, valid = make_target(case)
    ours = make_loss(LossConfig(), case.outputs)
    theirs = training.make_loss("bce_dice" if case.outputs == 1 else "ce_dice", case.outputs)
    got = jax_pass(
        make_flax(twin, case),
        images,
        train=True,
        masks=masks,
        loss=lambda logits: ours(logits, jnp.asarray(target), jnp.asarray(valid)),
        optimised=case.optimised,
    )
    want = torch_pass(
        twin,
        images,
        train=True,
        masks=masks,
        loss=lambda logits: theirs(logits, torch_target(target), torch_target(valid)),
    )
    return got, want
