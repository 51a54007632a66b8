"""Compute the network on 4 virtual devices of this CPU, in a process of its own.

`python -m parity_tests.support.sharded FOLDER` writes NAME.npz for each of `SPLITS`. The number of devices is fixed
when JAX starts, and the other tests need one: `ENVIRONMENT` has to be set before, since the tests ask for JAX's devices
when they are imported.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import jax
import numpy as np

from parity_tests.conftest import SETTINGS
from parity_tests.support.case import Case
from parity_tests.test_execution_paths import compute_outcome
from pdrunet_jax.model.fast import block, convolution
from pdrunet_jax.runtime.devices import make_mesh

ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}

CASE = Case(shape=(4, 64, 32))
PYRAMID = Case(depth=1, shape=(4, 11, 8), path="fused")


def average_of_variances(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Take each part's variance around its own mean, as if batch statistics were averaged over devices."""
    deviation = x - convolution.per_channel(x.mean((0, 1, 2)))
    count = convolution.pixel_count(x)
    return convolution.channel_sum(x) / count, convolution.channel_sum(deviation**2) / count


@dataclasses.dataclass(frozen=True)
class Split:
    """A case and the number of devices that its batch is split over."""

    case: Case
    devices: int
    remat: bool = False
    broken: tuple[object, str, Callable[..., object]] | None = None
    """What is replaced to make the comparison fail."""


SPLITS = {
    "fused, 2 devices": Split(CASE.replace(path="fused"), 2),
    "fused, 4 devices": Split(CASE.replace(path="fused"), 4),
    "plain, 4 devices": Split(CASE, 4),
    "polyphase, rematerialised, 2 devices": Split(CASE.replace(path="polyphase"), 2, remat=True),
    "U-Net, 2 devices": Split(PYRAMID.replace(network="unet", down="stride"), 2),
    "FusionNet, rematerialised, 2 devices": Split(PYRAMID.replace(network="fusionnet"), 2, remat=True),
    "variances of the parts averaged": Split(
        CASE.replace(path="fused"), 2, broken=(block, "moments", average_of_variances)
    ),
}


def main(folder: Path) -> None:
    """Compute all of `SPLITS`."""
    for name, value in SETTINGS.items():
        jax.config.update(name, value)
    for name, split in SPLITS.items():
        mesh = make_mesh(jax.devices()[: split.devices])
        if split.broken is None:
            arrays = compute_outcome(split.case, remat=split.remat, mesh=mesh)
        else:
            with patch.object(*split.broken):
                arrays = compute_outcome(split.case, remat=split.remat, mesh=mesh)
        np.savez(folder / f"{name}.npz", **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
