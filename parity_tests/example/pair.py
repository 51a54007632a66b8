"""The pair of the original and its port: `python -m parity_tests.support.prove parity_tests.example.pair:PAIR`."""

from typing import Any

import numpy as np
from flax import nnx

from parity_tests.example import draft, original, port
from parity_tests.support import pair


def inputs(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two images and what to find in them: small, odd and even sides, so that no rounding of sizes can hide."""
    return rng.random((2, 10, 13, 3)), rng.random((2, 3))


def make(**changes: Any) -> pair.Pair:
    """The pair, with other arguments of `pair.port`."""
    arguments: dict[str, Any] = {
        "flax": lambda: port.Locator(rngs=nnx.Rngs(0)),
        "torch": original.Locator,
        "inputs": inputs,
        "flax_loss": port.loss,
        "torch_loss": original.loss,
        "optimizer": port.OPTIMIZER,
        "torch_optimizer": original.optimizer,
    }
    return pair.port("locator", **arguments | changes)


PAIR = make()

FIRST = make(flax=lambda: draft.Locator(rngs=nnx.Rngs(0)), optimizer=draft.OPTIMIZER)
"""The first draft of the port."""
SECOND = make(flax=lambda: draft.Corrected(rngs=nnx.Rngs(0)), optimizer=draft.OPTIMIZER)
"""Its forward pass corrected."""
THIRD = make(optimizer=draft.OPTIMIZER)
"""Its running statistics too; then only the optimizer is wrong."""
