"""JAX on one CPU with stored programs, which start without Flax."""

import numpy as np

from pdrunet_jax.model.execution import custom_calls
from pdrunet_jax.predict.engines.engine import Engine
from pdrunet_jax.predict.engines.weights import Weights
from pdrunet_jax.runtime.programs import Program, load_program, make_program


class ProgramEngine(Engine):
    """A single network, in float32. For computers where `runtime.programs.is_possible`."""

    def __init__(self, weights: Weights) -> None:
        super().__init__("jax", "float32", weights.facts)
        self._weights = weights
        self._programs: dict[tuple[int, ...], Program] = {}

    def logits(self, images: np.ndarray) -> np.ndarray:
        """As of `Engine`."""
        if images.shape not in self._programs:
            self._programs[images.shape] = self._open(images)
        return np.asarray(self._programs[images.shape](self._weights.arrays, images))

    def _open(self, images: np.ndarray) -> Program:
        """The program for images of this shape: stored, or traced and stored."""
        calls = custom_calls()  # registered now, before a stored program asks for them
        key = self._weights.program_key(images.shape, calls)
        if program := load_program(key):
            return program
        from pdrunet_jax.predict.engines.loading import flat_forward  # Flax, which a stored program does not need

        arguments = self._weights.arrays, images
        return make_program(key, flat_forward(self._weights.network), arguments, custom_calls=calls)
