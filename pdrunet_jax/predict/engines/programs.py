"""JAX on one CPU with stored programs: traced once, they start without Flax. The same program, hence the same bits."""

from typing import Any

import numpy as np
from jax import export

from pdrunet_jax.model.execution import custom_calls
from pdrunet_jax.predict.engines.engine import Engine
from pdrunet_jax.predict.engines.weights import Weights
from pdrunet_jax.runtime import compile as compiling
from pdrunet_jax.runtime.devices import start_devices
from pdrunet_jax.runtime.store import discard_entry, read_entry, write_entry


def is_possible() -> bool:
    """Start JAX's devices. Whether it computes on one CPU, the device that programs are stored for."""
    devices = start_devices()
    return len(devices) == 1 and devices[0].platform == "cpu"


class ProgramEngine(Engine):
    """A single network, in float32."""

    def __init__(self, weights: Weights) -> None:
        super().__init__("jax", "float32", weights.facts)
        self._weights = weights
        self._programs: dict[tuple[int, ...], Any] = {}

    def logits(self, images: np.ndarray) -> np.ndarray:
        """As of `Engine`."""
        if images.shape not in self._programs:
            self._programs[images.shape] = self._open(images)
        return np.asarray(self._programs[images.shape](self._weights.arrays, images))

    def _compile(self, function: Any, arguments: Any) -> Any:
        jitted: Any = compiling.jit(function)
        return jitted.lower(*arguments).compile()

    def _open(self, images: np.ndarray) -> Any:
        """The program for images of this shape: stored, or traced and stored."""
        calls = custom_calls()  # registered now, before a stored program asks for them
        key = self._weights.program_key(images.shape, calls)
        arguments = self._weights.arrays, images
        if stored := read_entry("program", key):
            try:
                return self._compile(export.deserialize(bytearray(stored)).call, arguments)
            except Exception as error:  # of whatever kind: it is made again
                discard_entry("program", key, next(iter(str(error).splitlines()), type(error).__name__))
        from pdrunet_jax.predict.engines.loading import flat_forward  # Flax, which a stored program does not need

        forward: Any = compiling.jit(flat_forward(self._weights.network))
        checks = [export.DisabledSafetyCheck.custom_call(call) for call in calls]
        exported = export.export(forward, disabled_checks=checks)(*arguments)
        write_entry("program", key, bytes(exported.serialize()))
        return self._compile(exported.call, arguments)
