"""A run's folder: what lies where, the configuration it was started with, and one trainer at a time."""

import contextlib
import fcntl
import os
import platform
import socket
import subprocess
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import tomli_w

from pdrunet_jax import config_io
from pdrunet_jax.config import Config
from pdrunet_jax.errors import RunError, UserError
from pdrunet_jax.files import atomic_write, writing

MAY_CHANGE = ("tracking", "data.root", "data.threads", "data.cache")
"""Settings that a resumed run may change: none of them has a part in the result. Wherever the data lie now, their
fingerprint has to be the one that the checkpoints were saved with."""

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

    def record(self, config: Config, device: str = "") -> None:
        """Write config.toml, or compare `config` with the one the run was started with.

        A restart adds its time and the versions that changed. Raises `UserError` with the difference, and when the
        present config.toml cannot be read.
        """
        header = "What this run uses; written by the program. Start it again with the same settings to resume."
        now = environment(device)
        if self.config.exists():
            changed = config_io.diff(config_io.read(self.config), config, ignore=MAY_CHANGE)
            if changed:
                raise UserError(
                    f"{self.path} holds a run with other settings:\n"
                    + "\n".join(f"  - {line}" for line in changed)
                    + "\nGive the earlier settings to resume it, or choose another --workdir for a new run."
                )
            started: dict[str, Any] = tomllib.loads(self.config.read_text(encoding="utf-8")).get("environment", {})
            other = {key: value for key, value in now.items() if started.get(key) != value}
            now = {**started, "restarts": [*started.get("restarts", []), other]}
        with writing(self.config):
            atomic_write(self.config, config_io.to_toml(config, header) + "\n" + tomli_w.dumps({"environment": now}))


def open_run(path: str | Path, config: Config, device: str = "") -> RunFolder:
    """Make the run folder `path` with its config.toml, or reopen it if it holds a run with the same settings.

    Raises `UserError` with the difference if the settings differ (those of `MAY_CHANGE` may), or when another process
    has the folder; `RunError` when it cannot be written.
    """
    run = RunFolder(path)
    if run.path.exists() and not run.path.is_dir():
        raise UserError(f"--workdir {run.path} is a file; give a folder")
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        with run.lock():
            run.record(config, device)
    except OSError as error:
        raise RunError(f"{error.filename or run.path}: cannot be written ({error.strerror})") from None
    return run


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
