"""What a run says while it runs: metrics.jsonl (the local truth), a progress bar or lines, and Weights & Biases."""

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pdrunet_jax.config import Config
from pdrunet_jax.runtime.errors import RunError
from pdrunet_jax.runtime.files import atomic_write
from pdrunet_jax.runtime.run_folder import RunFolder
from pdrunet_jax.train.wandb_run import Picture, ScoreTable, WandbRun


class MetricsLog:
    """A JSONL file that is only appended to: one object per line, with the step first.

    Numbers read back as the same floats; what is not finite is null. Raises `RunError` that names the file if it
    cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Add one line and return what it holds; every value is a number, a string, or a list of those."""
        entry = {"step": step} | {name: _plain(value) for name, value in metrics.items()}
        line = json.dumps(entry, allow_nan=False) + "\n"
        try:
            # One write for the line, so that a killed process leaves at most one half line, and that at the end.
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                if os.write(descriptor, line.encode()) < len(line):
                    raise OSError(0, "only half a line could be written; is the disk full?")
            finally:
                os.close(descriptor)
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written ({error.strerror})") from None
        return entry

    def truncate_after(self, step: int) -> None:
        """Drop the lines of later steps, which a resumed run writes again, and a half-written last line."""
        if not self.path.exists():
            return
        try:
            lines = self.path.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if (found := _step(line)) is not None and found <= step]
            if kept != lines:
                atomic_write(self.path, b"".join(kept))
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written ({error.strerror})") from None

    def read(self) -> list[dict[str, Any]]:
        """Every whole line, in order."""
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().splitlines(keepends=True)
        return [json.loads(line) for line in lines if _step(line) is not None]


class ProgressBar:
    """A bar on a terminal; elsewhere a line for each log step."""

    def __init__(self, total: int, step: int = 0) -> None:
        self._total = total
        self._first = step
        self._began = time.monotonic()
        self._bar = tqdm(total=total, initial=step, unit="step", dynamic_ncols=True) if sys.stderr.isatty() else None

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show a log step. `time/data_wait` is a share of the time."""
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
        self.say(", ".join([f"step {step}/{self._total}", *parts, f"{_duration(left)} left"]))

    def say(self, line: str) -> None:
        """Print a line on standard output without tearing the bar."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stdout)
        else:
            print(line, flush=True)

    def close(self) -> None:
        """Leave the bar as it is and go to the next line."""
        if self._bar is not None:
            self._bar.close()


class Tracker:
    """Everything a training run reports goes through here.

    Args:
        run: the run folder, locked.
        config: its configuration.
        step: the step the run resumes from; later lines of metrics.jsonl are dropped.
        class_names: the foreground classes, for W&B's pictures.
    """

    def __init__(self, run: RunFolder, config: Config, *, step: int = 0, class_names: Iterable[str] = ()) -> None:
        self.metrics = MetricsLog(run.metrics)
        self.metrics.truncate_after(step)
        labels = {0: "background"} | dict(enumerate(class_names, 1)) | {255: "ignored"}
        self._wandb = WandbRun(run, config, labels)
        if self._wandb.place:
            print(self._wandb.place, flush=True)
        self.progress = ProgressBar(config.train.steps, step)
        self._finished = False

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Report a log step: values by the names of metrics.jsonl (`train/loss`, ...); arrays of one number will do."""
        entry = self.metrics.append(step, metrics)
        self.progress.update(step, entry)
        self._wandb.log(step, _numbers(entry))

    def validation(self, step: int, metrics: Mapping[str, Any], pictures: Iterable[Picture] = ()) -> None:
        """Report a validation (`val/dice`, ...) in one line, with pictures for W&B."""
        entry = self.metrics.append(step, metrics)
        shown = ", ".join(
            f"{name.removeprefix('val/')} {value:.4f}"
            for name, value in entry.items()
            if name.startswith("val/") and isinstance(value, int | float)
        )
        self.say(f"validation at step {step}: {shown}")
        self._wandb.log(step, _numbers(entry), pictures)

    def scores(self, split: str, summary: Mapping[str, float], table: ScoreTable, pictures: Iterable[Picture]) -> None:
        """Report the final scores of one split to W&B; the run folder has its own files of them."""
        self.progress.close()  # what is printed from here on stands below the bar
        self._wandb.scores(split, summary, table, pictures)

    def say(self, line: str) -> None:
        """Print a line on standard output."""
        self.progress.say(line)

    def finish(self, status: str, message: str = "") -> None:
        """Close everything; `status` is "finished", "stopped" or "failed", `message` goes into W&B's alert."""
        if not self._finished:
            self._finished = True
            self.progress.close()
            self._wandb.finish(status, message)


class Silent(Tracker):
    """A tracker that says and writes nothing: that of every process but the first."""

    def __init__(self) -> None:
        pass

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:  # noqa: D102
        pass

    def validation(self, step: int, metrics: Mapping[str, Any], pictures: Iterable[Picture] = ()) -> None:  # noqa: D102
        pass

    def say(self, line: str) -> None:  # noqa: D102
        pass

    def finish(self, status: str, message: str = "") -> None:  # noqa: D102
        pass


def _plain(value: Any) -> Any:
    """`value` as JSON has it; an array of one element is a number."""
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if not isinstance(value, float):
        value = value.item()
    return value if isinstance(value, int) or math.isfinite(value) else None


def _numbers(entry: Mapping[str, Any]) -> dict[str, float]:
    """What W&B can draw."""
    return {name: value for name, value in entry.items() if isinstance(value, int | float) and name != "step"}


def _step(line: bytes) -> int | None:
    """The step of a line, or None if the line is not whole."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) else None


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
