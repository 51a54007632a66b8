"""Synthetic X-rays of long bones with exact masks, which depend only on a seed and their index."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pdrunet_jax.data.phantoms.anatomy import draw_limb
from pdrunet_jax.data.phantoms.radiograph import LEVELS, radiograph

Difficulty = Literal["easy", "standard", "hard"]

_LIMB, _PICTURE = 0, 1  # independent streams of random numbers; files.py has the third


@dataclass(frozen=True)
class Phantom:
    """A synthetic radiograph."""

    image: NDArray[np.uint8]
    """(H, W), 0 to 255."""
    bones: NDArray[np.uint8]
    """(H, W): 0, or 1 + the place in `anatomy.BONES` of the bone there."""
    brightness: NDArray[np.float32]
    """(H, W) in [0, 1]: the image before quantization to 8 bits."""
    patient: str

    @property
    def mask(self) -> NDArray[np.uint8]:
        """(H, W) class indices: 1 inside long bones, else 0."""
        return (self.bones > 0).astype(np.uint8)


def draw(index: int, *, seed: int = 0, size: int = 256, difficulty: Difficulty = "standard") -> Phantom:
    """Draw phantom number `index`, (size, size) pixels.

    The result is bit-reproducible on the same kind of processor with the same NumPy and SciPy. The first two of every
    three phantoms show the same patient's limb.
    """
    patient = index // 3 * 2 + (index % 3 == 2)
    limb = draw_limb(generator(seed, _LIMB, patient))
    grey, bones, brightness = radiograph(limb, generator(seed, _PICTURE, index), size, LEVELS[difficulty])
    return Phantom(grey, bones, brightness.astype(np.float32), f"p{patient:05d}")


def generator(seed: int, stream: int, number: int) -> np.random.Generator:
    """Random generator that depends only on the arguments."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, stream, number))))
