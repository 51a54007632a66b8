"""When training goes wrong: which batch it was, and what was there before it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pdrunet_jax.data.dataset import Dataset
from pdrunet_jax.errors import RunError
from pdrunet_jax.files import atomic_write, writing
from pdrunet_jax.progress import Progress
from pdrunet_jax.runfolder import RunFolder


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
