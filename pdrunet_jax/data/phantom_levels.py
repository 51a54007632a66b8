"""How hard the phantoms are: faint bones, noise, scatter, and what hides bones in a hospital."""

from dataclasses import dataclass

import numpy as np

from pdrunet_jax.data.phantom_projection import Array


@dataclass(frozen=True)
class Level:
    """Factors of, and chances for, what makes a radiograph hard to read."""

    density: float = 1.0
    """Of bone: osteoporosis is below 1."""
    noise: float = 1.0
    scatter: float = 1.0
    cast: float = 0.06
    """Chance of plaster around the limb."""
    metal: float = 0.12
    """Chance of a plate or nail."""
    uncollimated: float = 0.15
    """Chance of an open field: no edges in the picture."""
    unmarked: float = 0.35
    """Chance of no lead letter."""
    wires: int = 0
    """Most cables and tubes that lie across the picture."""


STANDARD = Level()
LEVELS = {
    "easy": Level(1.3, 0.5, 0.5, cast=0.0, metal=0.0, uncollimated=0.6, unmarked=0.8),
    "standard": STANDARD,
    "hard": Level(0.6, 2.0, 2.0, cast=0.3, metal=0.3, wires=3),
}


def draw_wires(brightness: Array, x: Array, y: Array, rng: np.random.Generator, most: int, pixel: float) -> Array:
    """Up to `most` cables and tubes: bright lines that bend, tubes with a darker middle."""
    for _ in range(int(rng.integers(most + 1))):
        angle, bend, shift, phase = rng.uniform((0, -0.5, -0.35, 0), (np.pi, 0.5, 0.35, 2 * np.pi))
        along = np.float32(np.cos(angle)) * x + np.float32(np.sin(angle)) * y
        straight = np.float32(np.cos(angle)) * y - np.float32(np.sin(angle)) * x - np.float32(shift)
        sway = np.float32(0.015) * np.sin(np.float32(9) * along + np.float32(phase))
        across = straight + np.float32(bend) * along**2 + sway
        half, strength = rng.uniform((0.003, 0.1), (0.011, 0.4))
        line: Array = np.clip((np.float32(half) - np.abs(across)) / np.float32(pixel) + np.float32(0.5), 0, 1)
        if half > 0.007:
            bore = np.clip((np.float32(0.6 * half) - np.abs(across)) / np.float32(pixel) + np.float32(0.5), 0, 1)
            line = line * (1 - np.float32(0.6) * bore)
        brightness = np.clip(brightness + np.float32(strength) * line, 0, 1).astype(np.float32)
    return brightness
