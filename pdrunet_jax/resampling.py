"""What a graph outside Pillow has to know in order to repeat its bilinear `resize`, bit for bit.

Each axis has a pass of its own, a product with a matrix of weights. For output pixel i of a side that goes from s to t
pixels the weight of input pixel j is max(0, 1 - |j + 1/2 - (i + 1/2) s/t| / max(s/t, 1)), divided by the sum of the
row. For 8-bit pixels the weights are rounded to `FIXED_POINT` bits, and each pass is rounded to whole grey values.
"""

import numpy as np
from PIL import Image

FIXED_POINT = 22
"""Bits after the point in the weights for 8-bit pixels."""


def tall_images_vertically_first() -> bool:
    """Whether the installed Pillow starts with the vertical pass where the height shrinks by more than twice the width.

    Where that is so depends on its version: earlier ones always start with the horizontal pass. The two orders round
    differently, by one grey value in some pixels.
    """
    tall = np.random.default_rng(0).integers(0, 256, (96, 24), np.uint8)

    def resize(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
        return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))

    return np.array_equal(resize(tall, 20, 32), resize(resize(tall, 24, 32), 20, 32))
