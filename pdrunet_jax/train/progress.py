"""How far a run is, where its time goes, and the steps that have not been reported yet."""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError

from pdrunet_jax.config import TrainConfig
from pdrunet_jax.data.split import Sample
from pdrunet_jax.runtime.digest import SETTINGS
from pdrunet_jax.runtime.errors import RunError, UserError
from pdrunet_jax.runtime.files import atomic_write, writing
from pdrunet_jax.runtime.run_folder import RunFolder
from pdrunet_jax.train.step import Metrics, TrainState
from pdrunet_jax.train.tracking import Tracker


@dataclass(frozen=True)
class Progress:
    """The position of a run, without its arrays; part of each checkpoint.

    Attributes:
        data: fingerprint of the dataset; empty in a checkpoint that was converted from another framework.
        step: number of updates.
        sequence: digest of the indices of all samples so far, in order.
        best_dice: best validation Dice so far; below 0 before the first.
        best_step: step of the best validation Dice.
        validated: step of the last validation.
        stale: validations in sequence without a better Dice, as `train.patience` counts them.
    """

    __pydantic_config__ = ConfigDict(extra="ignore", allow_inf_nan=False)

    data: str
    step: int = 0
    sequence: str = ""
    best_dice: float = -1.0
    best_step: int = 0
    validated: int = 0
    stale: int = 0

    def advanced(self, index: np.ndarray) -> "Progress":
        """One step further, with the samples `index`."""
        digest = hashlib.sha256(self.sequence.encode() + index.astype("<i4").tobytes()).hexdigest()
        return replace(self, step=self.step + 1, sequence=digest)

    def scored(self, dice: float, settings: TrainConfig) -> "Progress":
        """After a validation at this step."""
        after = replace(self, validated=self.step)
        if dice > self.best_dice:
            return replace(after, best_dice=dice, best_step=self.step, stale=0)
        # One that ends a run early, with --finish, does not count: the run may go on.
        return replace(after, stale=self.stale + (self.step % settings.eval_every == 0))

    def stopped_early(self, settings: TrainConfig) -> bool:
        """Whether `train.patience` has run out."""
        return 0 < settings.patience <= self.stale

    def finished(self, settings: TrainConfig) -> bool:
        """Whether all steps are done, or no more are wanted."""
        return self.step >= settings.steps or self.stopped_early(settings)

    def validation_due(self, settings: TrainConfig) -> bool:
        """Whether to validate now."""
        due = self.step % settings.eval_every == 0 or self.finished(settings)
        return due and self.validated < self.step

    def log_due(self, settings: TrainConfig) -> bool:
        """Whether this step is logged."""
        return self.step % settings.log_every == 0 or self.finished(settings)

    def save_due(self, settings: TrainConfig) -> bool:
        """Whether to save a checkpoint now. Where a validation is due, the checkpoint waits for its result."""
        due = self.step % settings.save_every == 0 and self.step % settings.eval_every != 0
        return due and not self.finished(settings)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values for a checkpoint, which stores the step itself."""
        return {name: value for name, value in asdict(self).items() if name != "step"}

    @classmethod
    def resumed(cls, saved: Mapping[str, Any], step: int, data: str, settings: str, run: Path) -> "Progress":
        """Progress of the checkpoint of `step`.

        Raises `UserError` if `data`, the dataset's fingerprint, or `settings`, their digest, has changed.
        """
        if saved.get(SETTINGS, settings) != settings:
            what = f"the checkpoint of step {step} in {run} was saved with other settings than those of config.toml"
            raise UserError(f"{what}. Restore the one that was replaced, or choose another --workdir for a new run.")
        try:
            progress = TypeAdapter(cls).validate_python({**saved, "step": step})
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise UserError(
                f"the checkpoint of step {step} in {run} has no valid {where} ({first['msg']}). Restore an intact one, "
                "or choose another --workdir for a new run."
            ) from None
        if progress.data not in ("", data):
            raise UserError(
                f"{run} was trained on other data: images, masks or splits of data.root have changed since. "
                "Restore them to resume it, or choose another --workdir for a new run."
            )
        return replace(progress, data=data)


class Moment(NamedTuple):
    """A time in seconds, and the part of it so far that was spent waiting for data."""

    time: float
    waited: float


class Clock:
    """Time since the last report, and the part of it that was spent waiting for data."""

    def __init__(self) -> None:
        self._waited = 0.0
        self.restart()

    def restart(self) -> None:
        """Start again from zero."""
        self._start = self.now()

    def now(self) -> Moment:
        """This moment, for `lap`."""
        return Moment(time.perf_counter(), self._waited)

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time inside this `with` block as waiting."""
        entered = time.perf_counter()
        yield
        self._waited += time.perf_counter() - entered

    def lap(self, end: Moment | None = None) -> tuple[float, float]:
        """Return the seconds from the start to `end`, or now, and the share of them spent waiting; restart from there.

        The seconds are more than 0 even if the clock stands still.
        """
        start, self._start = self._start, end or self.now()
        seconds = max(self._start.time - start.time, 1e-9)
        return seconds, (self._start.waited - start.waited) / seconds


class DivergedError(RunError):
    """The loss or a gradient was not finite. `progress` is that of the last good step."""

    def __init__(self, progress: Progress, message: str) -> None:
        super().__init__(message)
        self.progress = progress


class _Step(NamedTuple):
    before: Progress
    samples: np.ndarray
    metrics: Metrics


class StepLog:
    """Steps whose results the device has not delivered yet.

    A step is reported after the next one has started, so that the device never waits for the log. A single process on a
    CPU reports it at once: it is done when its function returns. Divergence is noticed then, or at the latest by
    `flush`, which precedes every checkpoint. Only the process that `writes` puts a report of it, with the training
    `samples` concerned, into the run folder.

    Training starts from `step`, and each step has `batch_size` images.
    """

    def __init__(
        self, run: RunFolder, samples: Sequence[Sample], tracker: Tracker, step: int, batch_size: int, *, writes: bool
    ) -> None:
        self._run, self._samples, self._tracker, self._writes = run, samples, tracker, writes
        self._batch_size = batch_size
        self._logged = step
        self._unchecked: list[_Step] = []
        self._pending: tuple[Progress, Metrics, Moment | None] | None = None
        self.clock = Clock()

    def add(self, before: Progress, index: np.ndarray, metrics: Metrics) -> None:
        """Note a step that has just been started: the progress before it, its samples, and its future results."""
        self._unchecked.append(_Step(before, index, metrics))

    def report(self, state: TrainState, progress: Progress, metrics: Metrics, *, due: bool) -> None:
        """Log the last step that was due; this one, if it is, now or at the next call. Raises `DivergedError`."""
        # On a CPU the step is done by now; elsewhere its end is when its results arrive.
        end = self.clock.now() if _is_ready(metrics["loss"]) else None
        self._write(state)
        if due:
            self._pending = progress, metrics, end
        if end is not None and jax.process_count() == 1:  # several notice divergence together, in the same step
            self._write(state)

    def flush(self, state: TrainState) -> None:
        """Wait for the device and log everything. Raises `DivergedError`."""
        self._write(state)
        if bool(state.diverged):
            raise self._diverged(state)
        self._unchecked.clear()

    def _write(self, state: TrainState) -> None:
        if self._pending is None:
            return
        (progress, metrics, end), self._pending = self._pending, None
        if bool(metrics["diverged"]):
            raise self._diverged(state)
        loss = float(metrics["loss"])  # waits for the step, so that its whole time is measured
        seconds, waited = self.clock.lap(end)
        images = (progress.step - self._logged) * self._batch_size
        self._logged = progress.step
        self._tracker.log(
            progress.step,
            {
                "train/loss": loss,
                "train/dice": metrics["dice"],
                "train/grad_norm": metrics["grad_norm"],
                "train/learning_rate": metrics["learning_rate"],
                "time/images_per_second": images / seconds,
                "time/data_wait": waited,
                "data/sequence": progress.sequence,
            },
        )

    def _diverged(self, state: TrainState) -> DivergedError:
        """Write not_finite.json with the samples of the first bad batch, and return the error to raise."""
        good = int(state.step)
        bad = next(step for step in self._unchecked if step.before.step == good)
        loss = float(bad.metrics["loss"])
        samples = [self._samples[index].id if self._samples else f"drawn X-ray {index}" for index in bad.samples]
        report = {"step": good + 1, "loss": loss if np.isfinite(loss) else None, "samples": samples}
        path = self._run.path / "not_finite.json"
        if self._writes:
            with writing(path):
                atomic_write(path, json.dumps(report, indent=2) + "\n")
        return DivergedError(
            bad.before,
            f"the loss or a gradient of step {good + 1} is not finite; the update was not made. Its samples are listed "
            f"in {path}, and the checkpoint of step {good} holds the state before it. A lower --optim.learning-rate or "
            "--optim.clip-norm 1 may help.",
        )


def _is_ready(value: Any) -> bool:
    """Whether the device has delivered `value`; numbers of the host always are."""
    return not hasattr(value, "is_ready") or bool(value.is_ready())
