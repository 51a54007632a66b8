"""The stop flag of a training in several processes."""

from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pdrunet_jax.runtime.stop import SIGNALS, UNHEARD, StopFlag


class AgreedStop(StopFlag):
    """One stop flag for all processes, set in all of them at the same step.

    Each `ask` sends this process's flag to the others, as a device computation queued behind the training steps, and
    receives the flags sent two asks ago, so that the devices never wait. All processes must ask equally often.
    """

    BEHIND = 2

    def __init__(self, own: StopFlag) -> None:
        super().__init__()
        self._own = own
        mesh = Mesh(np.array(jax.devices()), ("devices",))
        self._spread = NamedSharding(mesh, PartitionSpec("devices"))
        self._highest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._sent: deque[jax.Array] = deque()

    def ask(self) -> bool:
        """Exchange flags; return whether any process had been asked to stop two asks ago."""
        names = ["", "request", UNHEARD, *(number.name for number in SIGNALS)]
        flags = np.full(jax.local_device_count(), names.index(self._own.signal or ""), np.int32)
        self._sent.append(self._highest(jax.make_array_from_process_local_data(self._spread, flags)))
        if len(self._sent) > self.BEHIND:
            self.signal = self.signal or names[int(self._sent.popleft())] or None
        return bool(self)
