"""What a training run knows beside its arrays: how far it is, and where its time goes.

When training goes wrong: which batch it was, and what was there before it.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pdrunet_jax.data.dataset import Dataset
from pdrunet_jax.runtime.errors import RunError, UserError
from pdrunet_jax.runtime.files import atomic_write, writing
from pdrunet_jax.runtime.run_folder import RunFolder


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


@dataclass(frozen=True)
class _Step:
    index: np.ndarray
    values: Mapping[str, Any]
    before: Progress


class Recent:
    """The steps since the device was last waited for; only then it turns out whether one of them was bad.

    Of several processes, only one `writes` what they find.
    """

    def __init__(self, run: RunFolder, dataset: Dataset, step: int, *, writes: bool = True) -> None:
        self._run = run
        self._writes = writes
        self._samples = dataset.of("train")
        self._steps: list[_Step] = []
        self._first = step

    def add(self, index: np.ndarray, values: Mapping[str, Any], before: Progress) -> None:
        """Note a step: the sample indices of its batch, what it returned, and the progress that it began with."""
        self._steps.append(_Step(index, values, before))

    def settle(self, progress: Progress) -> Progress:
        """`progress` with the batches that were skipped, which skipped.json then lists; begins anew."""
        skipped = self._skipped(len(self._steps))
        self._first += len(self._steps)
        self._steps.clear()
        if skipped:
            progress = replace(progress, skipped=[*progress.skipped, *skipped])
            if self._writes:
                write_skipped(self._run, progress)
        return progress

    def before(self, good: int) -> Progress:
        """The progress when `good` steps were done."""
        before = self._steps[good - self._first].before
        return replace(before, skipped=[*before.skipped, *self._skipped(good - self._first)])

    def error(self, good: int) -> RunError:
        """Write down the batch after step `good`, at which the run halted; the error to end with."""
        bad = self._steps[good - self._first]
        spike = bool(bad.values["finite"])
        path = self._run.path / ("spike.json" if spike else "not_finite.json")
        if self._writes:
            with writing(path):
                atomic_write(path, json.dumps(self._record(good, bad), indent=2) + "\n")
        if spike:
            loss, median = float(bad.values["loss"]), float(bad.values["median"])
            what = f"the loss of step {good + 1} is {loss:.4g}, far above the median of the last ones, {median:.4g}"
        else:
            what = f"the loss or a gradient of step {good + 1} is not finite"
        return RunError(
            f"{what}; the update was not made. Its samples are in {path}, and the state before it is kept as the "
            f"checkpoint of step {good}. A lower --optim.learning-rate or --optim.clip-norm 1 may help."
        )

    def _skipped(self, count: int) -> list[dict[str, Any]]:
        """Those of the first `count` steps whose batch was skipped."""
        steps = enumerate(self._steps[:count], self._first)
        return [self._record(number, step) for number, step in steps if step.values.get("spike", False)]

    def _record(self, number: int, step: _Step) -> dict[str, Any]:
        numbers = {name: float(step.values[name]) for name in ("loss", "median") if name in step.values}
        finite = {name: value if np.isfinite(value) else None for name, value in numbers.items()}
        return {"step": number + 1, **finite, "samples": [self._samples[int(index)].id for index in step.index]}


def write_skipped(run: RunFolder, progress: Progress) -> None:
    """Write skipped.json, or bring it back to what it was at an earlier step. Raises `RunError`."""
    path = run.path / "skipped.json"
    if progress.skipped or path.exists():
        with writing(path):
            atomic_write(path, json.dumps(list(progress.skipped), indent=2) + "\n")
