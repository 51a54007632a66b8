"""The folder of a training run: file names, the lock that admits one trainer, the record of the environment."""

import contextlib
import fcntl
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from pdrunet_jax.runtime.errors import RunError, UserError
from pdrunet_jax.runtime.files import TEMPORARY, atomic_write, open_in_place, require_inside, writing
from pdrunet_jax.runtime.opening import read_regular

MOST_STEPS = (1 << 31) - 1
"""Largest number of steps: optimizers count them in 32 bits."""

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class RunFolder:
    """Paths inside the folder of one run (`runs/NAME/`); the constructor creates nothing."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.toml"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.saved = self.path / "checkpoints.txt"
        self.best = self.path / "best.safetensors"
        self.training_images = self.path / "training_images.txt"
        self.report = self.path / "report.html"
        self.samples = self.path / "samples"
        self.wandb = self.path / "wandb"
        self.evaluation = self.path / "evaluation"

    def note_checkpoint(self) -> None:
        """Note outside `checkpoints/` that it has held a checkpoint. Raises `RunError`."""
        if not self.saved.exists():
            with writing(self.saved):
                atomic_write(self.saved, "This run has saved checkpoints: without them it is not begun again.\n")

    def require_new(self, first: int) -> None:
        """Raise `UserError` if this folder without checkpoints has had one; the run saves the first at step `first`."""
        found = [path.name for path in (self.saved, self.best, self.report) if path.exists()]
        if any(entry and entry["step"] > first for entry in read_entries(self.metrics)):
            found.append(self.metrics.name)
        if found:
            raise UserError(
                f"{self.checkpoints} has no checkpoint, but {self.path} holds a run ({', '.join(found)}). Restore its "
                "checkpoints to resume it, or choose another --workdir for a new run; nothing was overwritten."
            )

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the folder for this process; the operating system releases the lock however the process ends.

        Raises `UserError` that names the holder if another process has it, or a folder that leads out of this one, and
        `RunError` if the file cannot be locked.
        """
        require_inside(self.path, self.checkpoints, self.samples, self.wandb, self.evaluation)
        path = self.path / "lock"
        with writing(path):
            descriptor = open_in_place(path, os.O_RDWR)
        try:
            self._take(descriptor)
            for leftover in self.path.glob(TEMPORARY):  # of a killed process
                leftover.unlink(missing_ok=True)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            yield
        finally:
            os.close(descriptor)

    def require_free(self) -> None:
        """Raise `UserError` that names the holder if another process holds the lock; writes nothing."""
        try:
            descriptor = os.open(self.path / "lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:  # no lock file yet, or one that `lock` will report
            return
        try:
            self._take(descriptor)
        finally:
            os.close(descriptor)

    def _take(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 1000).decode(errors="replace").strip() or "another process"
            raise UserError(
                f"{self.path} is in use by {holder}; wait until that process ends, stop it, or choose another --workdir"
            ) from None
        except OSError as error:
            raise RunError(
                f"{self.path}: this file system has no file locks ({error.strerror}); choose another --workdir"
            ) from None


def read_entries(path: Path) -> list[dict[str, Any] | None]:
    """Entries of a metrics.jsonl, in order; None for a line that is not a JSON object with a step and sensible numbers.

    A partial last line, which a killed process may leave, is left out. A missing file has no entries.
    """
    entries: list[dict[str, Any] | None] = []
    for line in read_regular(path).split(b"\n")[:-1] if path.exists() else []:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        entries.append(entry if isinstance(entry, dict) and _plausible(entry) else None)
    return entries


def _plausible(entry: dict[str, Any]) -> bool:
    """Whether training can have written this: a step from 0 to `MOST_STEPS`, and integers that fit a float."""
    step = entry.get("step")
    if type(step) is not int or not 0 <= step <= MOST_STEPS:
        return False
    return all(abs(value) < sys.float_info.max for value in entry.values() if isinstance(value, int))


def environment(device: str = "") -> dict[str, Any]:
    """Versions, platform, git revision and time of the start; no environment variables."""
    versions = {name: metadata.version(name) for name in PACKAGES}
    with contextlib.suppress(metadata.PackageNotFoundError):
        versions["pdrunet_jax"] = metadata.version("pdrunet-jax")
    facts = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "git": git_revision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    return {key: value for key, value in facts.items() if value} | versions


def git_revision() -> str | None:
    """The commit of this package, with `-dirty` if files changed since; None outside a git checkout."""
    package = Path(__file__).parent
    tracked = ["git", "-C", str(package), "ls-files", "--error-unmatch", Path(__file__).name]
    describe = ["git", "-C", str(package), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        subprocess.run(tracked, check=True, capture_output=True, timeout=10)
        revision = subprocess.run(describe, check=True, capture_output=True, timeout=10, text=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return revision or None
