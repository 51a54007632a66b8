"""A run's folder: what lies where, the configuration it was started with, and one trainer at a time."""

import contextlib
import fcntl
import os
import platform
import socket
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from pdrunet_jax.runtime.errors import RunError, UserError

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class RunFolder:
    """The layout of one run (`runs/NAME/`); makes nothing by itself."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.toml"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.best = self.path / "best.safetensors"
        self.report = self.path / "report.html"
        self.samples = self.path / "samples"
        self.wandb = self.path / "wandb"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process; the operating system lets go when the process ends, however it ends.

        Raises `UserError` that names the holder if another process has it.
        """
        path = self.path / "lock"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise RunError(f"{path}: cannot be written ({error.strerror})") from None
        try:
            self._take(descriptor)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            yield
        finally:
            os.close(descriptor)

    def require_free(self) -> None:
        """Raise `UserError` that names the holder if another process has the folder now; writes nothing."""
        try:
            descriptor = os.open(self.path / "lock", os.O_RDONLY)
        except OSError:  # whatever it is, `lock` says it where it matters
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
                f"{self.path} is in use by {holder}: one run folder takes one trainer at a time; "
                "wait for that one, stop it, or choose another --workdir"
            ) from None
        except OSError as error:
            raise RunError(f"{self.path}: this file system offers no locks ({error.strerror})") from None


def environment(device: str = "") -> dict[str, Any]:
    """Versions, platform, git revision and time, for the record; nothing of the process's environment variables."""
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
    """The commit this package was run from (`-dirty` appended if changed since), or None if it is no git checkout."""
    package = Path(__file__).parent
    tracked = ["git", "-C", str(package), "ls-files", "--error-unmatch", Path(__file__).name]
    describe = ["git", "-C", str(package), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        subprocess.run(tracked, check=True, capture_output=True, timeout=10)
        revision = subprocess.run(describe, check=True, capture_output=True, timeout=10, text=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return revision or None
