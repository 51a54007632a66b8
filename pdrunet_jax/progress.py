"""What a training run knows beside its arrays: how far it is, and where its time goes."""

import dataclasses
import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pdrunet_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a run knows beside the arrays; saved with each checkpoint.

    Attributes:
        data: fingerprint of the dataset; empty in a checkpoint that another framework's training was converted to.
        sequence: digest over the indices of all samples so far, in order.
        best_dice: best validation Dice so far; below 0 before the first.
        best_step: the step it was reached at.
        validated: the step of the last validation.
        skipped: batches without an update, because their loss was a spike: step, loss, median and samples of each.
    """

    data: str
    sequence: str = ""
    best_dice: float = -1.0
    best_step: int = 0
    validated: int = 0
    skipped: Sequence[Mapping[str, Any]] = ()

    def seen(self, index: Any) -> "Progress":
        """With the batch of these sample indices behind it."""
        digest = hashlib.sha256(self.sequence.encode() + index.astype("<i4").tobytes()).hexdigest()
        return dataclasses.replace(self, sequence=digest)

    def scored(self, step: int, dice: float) -> "Progress":
        """With a validation at `step` behind it."""
        after = dataclasses.replace(self, validated=step)
        return dataclasses.replace(after, best_dice=dice, best_step=step) if dice > self.best_dice else after

    def resumed(self, saved: dict[str, Any], run: Path) -> "Progress":
        """The progress of a checkpoint; raises `UserError` if the dataset is not the one it was saved with."""
        saved = {**saved, "data": saved["data"] or self.data}
        if saved["data"] != self.data:
            raise UserError(
                f"{run} was trained on other data: images, masks or splits of data.root have changed since. "
                "Bring the earlier ones back to resume it, or choose another --workdir for a new run."
            )
        return Progress(**saved)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**vars(self), "skipped": list(self.skipped)}


class Clock:
    """Time since the last report, and how much of it went into waiting for data."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Start to count anew."""
        self._start = time.perf_counter()
        self._waited = 0.0

    def waiting_for_data(self) -> "Clock":
        """Count the time inside this `with` block as waiting."""
        return self

    def __enter__(self) -> None:
        self._entered = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._waited += time.perf_counter() - self._entered

    def lap(self) -> tuple[float, float]:
        """Seconds since the start, and the share of them spent waiting; starts anew."""
        total, waited = time.perf_counter() - self._start, self._waited
        self.restart()
        return total, waited / total
