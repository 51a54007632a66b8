"""How a command is told that it is one of several processes. No setting of a run: it has no part in the result."""

import re
from dataclasses import dataclass
from typing import Annotated

import tyro

from pdrunet_jax.errors import UserError

Detect = Annotated[bool, tyro.conf.arg(name="distributed"), tyro.conf.FlagCreatePairsOff]
"""The option --distributed, alone, beside those of `Distributed`."""


@dataclass(frozen=True)
class Distributed:
    """Several processes, on one machine or many; see docs/distributed.md.

    On SLURM, Kubernetes and Cloud TPU, --distributed alone finds out everything. Elsewhere each process is given
    coordinator, processes and index.
    """

    coordinator: str | None = None
    """HOST:PORT at which all processes reach the first one; any free port of its machine."""
    processes: int | None = None
    """How many there are."""
    index: int | None = None
    """Which one this is; 0 is the first."""
    timeout: int = 300
    """Seconds to wait for the others at the start."""

    def wanted(self, detect: bool) -> bool:
        """Whether several processes were asked for. Raises `UserError` if it was said by halves or makes no sense."""
        given = {"coordinator": self.coordinator, "processes": self.processes, "index": self.index}
        missing = [f"--distributed.{name}" for name, value in given.items() if value is None]
        if self.timeout < 1:
            raise UserError(f"--distributed.timeout {self.timeout}: at least 1 second")
        if len(missing) == 3:
            return detect
        if self.coordinator is None or self.processes is None or self.index is None:
            raise UserError(
                f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: without a cluster that JAX "
                "knows, give all of --distributed.coordinator HOST:PORT --distributed.processes N --distributed.index I"
            )
        if not re.fullmatch(r"[^:\s]+:[0-9]{1,5}|\[[0-9a-fA-F:.]+\]:[0-9]{1,5}", self.coordinator):
            raise UserError(f"--distributed.coordinator {self.coordinator}: give HOST:PORT, as in node1:9000")
        if self.processes < 1:
            raise UserError(f"--distributed.processes {self.processes}: at least 1")
        if not 0 <= self.index < self.processes:
            raise UserError(
                f"--distributed.index {self.index}: the {self.processes} processes are numbered "
                f"from 0 to {self.processes - 1}"
            )
        return True
