"""Run output: metrics.jsonl, a progress bar or lines, Weights & Biases."""

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from pdrunet_jax.config import Config
from pdrunet_jax.runtime.files import atomic_write, open_in_place, writing
from pdrunet_jax.runtime.opening import read_regular
from pdrunet_jax.runtime.run_folder import RunFolder, read_entries
from pdrunet_jax.train.wandb_run import Picture, ScoreTable, WandbRun


class Tracker:
    """Reports a training run; a context manager that closes the outputs on exit.

    An exception that leaves the context marks the W&B run as failed, with the exception's text in its alert.

    Args:
        run: the run folder, locked; None for a tracker that prints and writes nothing.
        config: the configuration of the run.
        step: the step that the run resumes from; lines of later steps in metrics.jsonl are dropped.
        class_names: names of the foreground classes, for pictures in W&B.

    Attributes:
        status: how the run ends for W&B if no exception is raised: "finished" (default) or "stopped".
    """

    def __init__(
        self, run: RunFolder | None, config: Config, *, step: int = 0, class_names: Iterable[str] = ()
    ) -> None:
        self.status = "finished"
        self._active = run is not None
        if run is None:
            return
        self._metrics = MetricsLog(run.metrics)
        self._metrics.truncate_after(step)
        self._wandb = WandbRun(run, config, {0: "background"} | dict(enumerate(class_names, 1)) | {255: "ignored"})
        if self._wandb.place:
            print(self._wandb.place, flush=True)
        self._bar = ProgressBar(config.train.steps, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if not self._active:
            return
        self._bar.close()
        if error is None:
            self._wandb.finish(self.status)
        else:
            self._wandb.finish("failed", str(error))

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Report the metrics of a log step under their names in metrics.jsonl (`train/loss`, ...).

        Values are numbers, arrays of one element, or strings.
        """
        if self._active:
            entry = self._metrics.append(step, metrics)
            self._bar.update(step, entry)
            self._wandb.log(step, _numbers(entry))

    def validation(self, step: int, metrics: Mapping[str, Any], pictures: Iterable[Picture] = ()) -> None:
        """Report a validation (`val/dice`, ...) in one line; W&B gets `pictures` too."""
        if self._active:
            numbers = _numbers(self._metrics.append(step, metrics))
            shown = (f"{name.removeprefix('val/')} {value:.4f}" for name, value in numbers.items())
            self.say(f"validation at step {step}: {', '.join(shown)}")
            self._wandb.log(step, numbers, pictures)

    def scores(
        self, step: int, split: str, summary: Mapping[str, float], table: ScoreTable, pictures: Iterable[Picture]
    ) -> None:
        """Report the final scores of a split, after the last `step`, to W&B, and close the progress bar."""
        if self._active:
            self._bar.close()
            self._wandb.scores(step, split, summary, table, pictures)

    def say(self, line: str) -> None:
        """Print a line on standard output."""
        if self._active:
            self._bar.say(line)


class MetricsLog:
    """Append-only metrics.jsonl: one JSON object per line, the step first.

    Floats read back bit for bit; a value that is not finite is null. Raises `RunError` with the file's name if it
    cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Append one line and return its entry."""
        entry = {"step": step} | {name: _plain(value) for name, value in metrics.items()}
        line = json.dumps(entry, allow_nan=False) + "\n"
        with writing(self.path):
            # One write per line: a killed process leaves at most one partial line, at the end.
            descriptor = open_in_place(self.path, os.O_WRONLY | os.O_APPEND)
            try:
                if os.write(descriptor, line.encode()) < len(line):
                    raise OSError(0, "only part of a line could be written; is the disk full?")
            finally:
                os.close(descriptor)
        return entry

    def truncate_after(self, step: int) -> None:
        """Drop the lines of later steps, which a resumed run writes again, and lines that are damaged or partial."""
        if not self.path.exists():
            return
        with writing(self.path):
            content = read_regular(self.path)
            lines = zip(content.split(b"\n")[:-1], read_entries(self.path), strict=True)
            kept = b"".join(line + b"\n" for line, entry in lines if entry and entry["step"] <= step)
            if kept != content:
                atomic_write(self.path, kept)


class ProgressBar:
    """Progress bar on a terminal; one line per log step elsewhere."""

    def __init__(self, total: int, step: int = 0) -> None:
        self._total = total
        self._first = step
        self._began = time.monotonic()
        # Drawn at every call: tqdm's least interval would wait for a wall clock that has gone back.
        options: dict[str, Any] = {"unit": "step", "dynamic_ncols": True, "mininterval": 0}
        # A terminal without a size (`docker run -t`) has no room for the bar.
        shown = sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
        self._bar = tqdm(total=total, initial=step, **options) if shown else None

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show the metrics of a log step; `time/data_wait` is a fraction of the time."""
        parts = [
            f"{label} {metrics[name]:{form}}"
            for name, label, form in (
                ("train/loss", "loss", ".4f"),
                ("train/dice", "Dice", ".4f"),
                ("time/images_per_second", "images/s", ".1f"),
                ("time/data_wait", "data wait", ".0%"),
            )
            if isinstance(metrics.get(name), int | float)
        ]
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(parts), refresh=False)
            self._bar.update(step - self._bar.n)
            return
        left = (time.monotonic() - self._began) / max(step - self._first, 1) * (self._total - step)
        self.say(", ".join([f"step {step}/{self._total}", *parts, f"{tqdm.format_interval(left)} left"]))

    def say(self, line: str) -> None:
        """Print a line on standard output, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stdout)
        else:
            print(line, flush=True)

    def close(self) -> None:
        """End the bar's line; later output starts below it."""
        if self._bar is not None:
            self._bar.close()


def _plain(value: Any) -> Any:
    """Convert to a JSON value; an array of one element becomes a number."""
    if isinstance(value, str | bool | int) or value is None:
        return value
    if not isinstance(value, float):
        value = value.item()
    return value if isinstance(value, int) or math.isfinite(value) else None


def _numbers(entry: Mapping[str, Any]) -> dict[str, float]:
    """The values that W&B can plot."""
    return {name: value for name, value in entry.items() if isinstance(value, int | float) and name != "step"}
