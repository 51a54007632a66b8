"""The network on parts of this CPU that JAX takes for 4 devices, in a process of its own.

`python -m parity_tests.support.sharded FOLDER` leaves NAME.npz for each of `SPLITS`. JAX has to be told of devices
before it starts, and the other tests are of one.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np

from parity_tests.conftest import SETTINGS
from parity_tests.support.case import Case
from parity_tests.test_execution_paths import outcome
from pdrunet_jax.model import sharding as shards
from pdrunet_jax.model.fast import block as fused_block
from pdrunet_jax.model.fast import convolution as fused
from pdrunet_jax.runtime.devices import make_mesh

LARGE = Case(shape=(1, 256, 96))
SMALL = Case(shape=(2, 64, 32))


def zeros_for_neighbours(x: jax.Array, rows: int) -> jax.Array:
    """Each part convolved by itself, as if the image ended there."""
    return jnp.pad(x, ((0, 0), (rows, rows), (0, 0), (0, 0)))


def moments_without_what_lies_between(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The parts' variances, each around the part's own mean, averaged."""
    deviation = x - fused.per_channel(x.mean((0, 1, 2)))
    return fused.channel_sum(x) / fused.pixel_count(x), fused.channel_sum(deviation**2) / fused.pixel_count(x)


@dataclasses.dataclass(frozen=True)
class Split:
    """A case and the (data, rows) that it is split into."""

    case: Case
    mesh: tuple[int, int]
    remat: bool = False
    broken: tuple[object, str, Callable[..., object]] | None = None
    """What is replaced to make the comparison fail."""


SPLITS = {
    "fused, 2 rows": Split(LARGE.replace(path="fused"), (1, 2)),
    "fused, 4 rows": Split(LARGE.replace(path="fused"), (1, 4)),
    "plain, 2 rows": Split(LARGE, (1, 2)),
    "polyphase, rematerialised, 2 images and 2 rows": Split(SMALL.replace(path="polyphase"), (2, 2), remat=True),
    "neighbours taken for zeros": Split(
        SMALL.replace(path="fused"), (2, 2), broken=(shards, "with_neighbours", zeros_for_neighbours)
    ),
    "variances of the parts": Split(
        SMALL.replace(path="fused"), (2, 2), broken=(fused_block, "moments", moments_without_what_lies_between)
    ),
}


def main(folder: Path) -> None:
    """Compute all of `SPLITS`."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    for name, value in SETTINGS.items():
        jax.config.update(name, value)
    for name, split in SPLITS.items():
        mesh = make_mesh(split.mesh[1], jax.devices()[: split.mesh[0] * split.mesh[1]])
        if split.broken is None:
            arrays = outcome.__wrapped__(split.case, remat=split.remat, mesh=mesh)
        else:
            with patch.object(*split.broken):
                arrays = outcome.__wrapped__(split.case, remat=split.remat, mesh=mesh)
        np.savez(folder / f"{name}.npz", **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
