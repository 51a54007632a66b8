"""What several processes of one run have to agree on: settings, data, where to resume, when to stop."""

import json
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pdrunet_jax import config_io
from pdrunet_jax.checkpoint import Checkpoints, Restored
from pdrunet_jax.config import Config
from pdrunet_jax.data.dataset import Dataset
from pdrunet_jax.errors import UserError
from pdrunet_jax.processes import Group
from pdrunet_jax.runfolder import MAY_CHANGE
from pdrunet_jax.stopping import SIGNALS, StopFlag


def require_same_settings(group: Group, config: Config) -> None:
    """Raise `UserError` with the difference if this process has other settings than the first."""
    text = group.of_first(config_io.to_toml(config))
    changed = config_io.diff(config_io.parse(text, "the first process's settings"), config, ignore=MAY_CHANGE)
    if changed:
        raise UserError(
            f"process {group.index} has other settings than the first one:\n"
            + "\n".join(f"  - {line}" for line in changed)
            + "\nGive all processes the same."
        )


def require_same_data(group: Group, dataset: Dataset) -> None:
    """Raise `UserError` if the dataset that this process sees is not the first one's."""
    group.require_same(
        dataset.fingerprint(),
        f"--data.root {dataset.root} holds other data than that of the first process: images, masks or splits differ. "
        "Give all processes the same files; the folder may be another one on each machine.",
    )


class GroupCheckpoints:
    """The checkpoints of a run of several processes: the first one writes and reads them, and tells the others.

    Parameters are the same in every process, so that one of them has all there is to save; no other one needs to reach
    the folder. A checkpoint knows nothing of how many devices or processes there were.
    """

    def __init__(self, group: Group, folder: Path, keep_latest: int, keep_best: int) -> None:
        self._group = group
        self._own = Checkpoints(folder, keep_latest, keep_best) if group.first else None

    def latest_step(self) -> int | None:
        """As `Checkpoints.latest_step`, in the first process."""
        return None if self._own is None else self._own.latest_step()

    def restore(self, template: Any) -> Restored | None:
        """As `Checkpoints.restore`; but the state is `template` itself in every process but the first."""
        found = None if self._own is None else self._own.restore(template)
        about = {name: value for name, value in vars(found).items() if name != "state"} if found else {}
        about = json.loads(self._group.of_first(json.dumps(about)))
        if not about:
            return None
        return Restored(state=found.state if found else template, **about)

    def save(
        self,
        step: int,
        state: Any,
        position: Mapping[str, Any],
        extra: Mapping[str, Any] | None = None,
        val_dice: float | None = None,
    ) -> None:
        """As `Checkpoints.save`, in the first process; the others need not wait: their next step does."""
        if self._own is not None:
            self._own.save(step, state, position, extra, val_dice)


class AgreedStop(StopFlag):
    """The flags of all processes as one, which is set in all of them at the same place of the program.

    Each `ask` sends this process's flag to the others, as a computation of the devices behind those of the steps, and
    receives what was sent two asks ago: the devices never wait for it. All processes have to ask equally often.
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
        """Exchange flags; whether any process was asked to stop before its last ask but one."""
        names = ["", "request", *(number.name for number in SIGNALS)]
        flags = np.full(jax.local_device_count(), names.index(self._own.signal or ""), np.int32)
        self._sent.append(self._highest(jax.make_array_from_process_local_data(self._spread, flags)))
        if len(self._sent) > self.BEHIND:
            self.signal = self.signal or names[int(self._sent.popleft())] or None
        return bool(self)
