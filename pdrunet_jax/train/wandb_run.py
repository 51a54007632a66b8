"""Weights & Biases. It is a guest: if anything about it fails, one warning is printed and training goes on."""

import contextlib
import netrc
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from pdrunet_jax import config as config_io
from pdrunet_jax.config import Config
from pdrunet_jax.runtime.files import atomic_write
from pdrunet_jax.runtime.run_folder import RunFolder

INIT_TIMEOUT = 30.0
FINISH_TIMEOUT = 120.0
"""Seconds that W&B may hold up the start and the end of a run; what is not uploaded by then stays in the folder."""

KILLED = 5.0
"""Seconds to wait until W&B has seen that its service was killed, which takes a fraction of one."""

HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")
"""Under which W&B's own login may have stored a key."""


@dataclass(frozen=True)
class Picture:
    """One image with its masks, for W&B's own viewer.

    `image` is (H, W), (H, W, 1) or (H, W, 3) uint8; `prediction` and `truth` are (H, W) uint8 class indices.
    """

    name: str
    image: np.ndarray
    prediction: np.ndarray
    truth: np.ndarray | None = None


ScoreTable = tuple[Sequence[str], Sequence[Sequence[Any]]]
"""Names of columns, and the rows; NaN where a score is not defined."""


class WandbRun:
    """One W&B run that belongs to a run folder: the same id each time the folder is opened, so resuming continues it.

    `labels` names the class indices of pictures. Nothing here raises.
    """

    def __init__(self, run: RunFolder, config: Config, labels: Mapping[int, str] | None = None) -> None:
        self._folder = run
        self._config = config
        self._labels = dict(labels or {})
        self._run: Any = None
        self._online = False
        self._began = self._abandoned = False
        self._service: subprocess.Popen[bytes] | None = None
        self._scores: tuple[str, Mapping[str, float], ScoreTable, Iterable[Picture]] | None = None
        if config.tracking.wandb == "disabled":
            return
        modes = [_mode(config.tracking.wandb)]
        if modes == ["online"]:
            modes.append("offline")  # better kept for a later `wandb sync` than lost
        for mode in modes:
            with self._guarded(f"start {mode}"):
                self._run = self._start(mode)
                self._online = mode == "online"
                break
            with self._guarded("end its service"):  # which would keep the run's id for the attempt that failed
                _import().teardown(exit_code=0)

    @property
    def place(self) -> str:
        """Where the run can be seen, in one line; empty without W&B."""
        if self._run is None:
            return ""
        if self._online:
            return f"W&B: {self._run.url}"
        return f"W&B: offline; upload later with: wandb sync {self._folder.wandb}/offline-run-*"

    def log(self, step: int, metrics: Mapping[str, Any], pictures: Iterable[Picture] = ()) -> None:
        """Log one step; pictures go under `val/images`."""
        if self._run is None:
            return
        with self._guarded("log"):
            values = dict(metrics)
            images = [self._image(picture) for picture in pictures]
            if images:
                values["val/images"] = images
            self._run.log(values, step=step)

    def scores(self, split: str, summary: Mapping[str, float], table: ScoreTable, pictures: Iterable[Picture]) -> None:
        """Final scores of one split: `summary` by name, a table with a row for each image and class, and pictures.

        Their names are `SPLIT/...`. They are kept for `finish`, which does not wait without end.
        """
        self._scores = split, summary, table, pictures

    def finish(self, status: str, message: str = "") -> None:
        """Upload what is left, alert (only online) and close. `status` is "finished", "stopped" or "failed".

        Takes `INIT_TIMEOUT` and twice `FINISH_TIMEOUT` at most: for scores, for the upload, for its service to end.
        """
        if not self._began:
            return
        limit = 2 * _seconds("WANDB_FINISH_TIMEOUT", FINISH_TIMEOUT)
        if self._scores is not None:
            limit += _seconds("WANDB_INIT_TIMEOUT", INIT_TIMEOUT)
        # In a thread, because W&B waits for its service without end, and the service for a server that is down.
        closing = threading.Thread(target=self._close, args=(status, message), daemon=True)
        closing.start()
        closing.join(limit)
        if closing.is_alive():
            if self._run is not None:
                kept = f"what it has not uploaded is kept in {self._folder.wandb}, for wandb sync"
                print(f"warning: W&B did not end within {limit:.0f} s; {kept}", file=sys.stderr)
            self._abandoned = True
            if self._service is not None:
                self._service.kill()  # it would outlive this process by hours
                closing.join(KILLED)  # or what is left of W&B would say at the end of this process that it is gone
        self._run, self._began = None, False

    def _close(self, status: str, message: str) -> None:
        run, folder = self._run, self._folder
        if run is not None:
            if self._scores is not None:
                with self._guarded("log the scores"):
                    self._log_scores(run, *self._scores)
            failed = self._run is None  # which was said; once is enough
            with contextlib.suppress(Exception) if failed else self._guarded("finish"):
                if self._online and status != "stopped":
                    run.alert(title=f"{run.name}: {status}", text=message or status)
                if status == "finished" and self._config.tracking.artifact and folder.best.is_file():
                    artifact = _import().Artifact(f"{run.id}-best", type="model")
                    artifact.add_file(str(folder.best))
                    run.log_artifact(artifact)
                run.finish(exit_code=1 if status == "failed" else 0)
        # Its service may still be writing when `finish` returns. One that has failed does not end well either, and
        # would say so once more when the process ends.
        with contextlib.suppress(Exception):
            _import().teardown()

    def _log_scores(
        self, run: Any, split: str, summary: Mapping[str, float], table: ScoreTable, pictures: Iterable[Picture]
    ) -> None:
        """To the last step, or behind it where the run was ended there before; what needs no server first."""
        run.summary.update({f"{split}/{name}": value for name, value in summary.items() if value == value})
        step = max(run.step, self._config.train.steps)
        if images := [self._image(picture) for picture in pictures]:
            run.log({f"{split}/images": images}, step=step)
        columns, rows = table
        cells = [[None if cell != cell else cell for cell in row] for row in rows]
        logged = {f"{split}/per_image": _import().Table(columns=list(columns), data=cells)}
        # Of a table W&B first asks its server something, and waits for the answer as long as there is none.
        _within(_seconds("WANDB_INIT_TIMEOUT", INIT_TIMEOUT), lambda: run.log(logged, step=step))

    @contextlib.contextmanager
    def _guarded(self, action: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever it is, it is not worth a training run
            self._run = None
            if self._abandoned:
                return
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            print(f"warning: W&B could not {action}: {reason}; the run goes on without it", file=sys.stderr)

    def _start(self, mode: str) -> Any:
        self._folder.wandb.mkdir(parents=True, exist_ok=True)
        for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):  # no setting exists for these
            os.environ.setdefault(name, str((self._folder.wandb / "cache").absolute()))
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # nobody asked for reports to third parties
        wandb = _import()
        self._began = True
        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,  # a patch or a remote's address may hold secrets
            disable_code=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
            init_timeout=_seconds("WANDB_INIT_TIMEOUT", INIT_TIMEOUT),
            login_timeout=_seconds("WANDB_LOGIN_TIMEOUT", INIT_TIMEOUT),
            finish_timeout=_seconds("WANDB_FINISH_TIMEOUT", FINISH_TIMEOUT),
        )
        tracking = self._config.tracking
        run = wandb.init(
            project=tracking.project,
            entity=tracking.entity,
            name=tracking.name or self._folder.path.absolute().name,
            tags=tracking.tags,
            dir=str(self._folder.path.absolute()),
            config=config_io.to_dict(self._config),
            id=self._id(),
            resume="allow" if mode == "online" else None,
            mode=mode,
            settings=settings,
        )
        with contextlib.suppress(AttributeError):  # there is no public way to it
            self._service = wandb.setup()._connection._proc._process
        for name in ("train/dice", "val/dice", "val/iou"):
            run.define_metric(name, summary="max")
        for name in ("train/loss", "val/loss"):
            run.define_metric(name, summary="min")
        return run

    def _id(self) -> str:
        path = self._folder.wandb / "id"
        if not path.is_file():
            atomic_write(path, secrets.token_hex(4))
        return path.read_text(encoding="utf-8").strip()

    def _image(self, picture: Picture) -> Any:
        masks = {"prediction": picture.prediction, "truth": picture.truth}
        return _import().Image(
            picture.image.squeeze(),
            caption=picture.name,
            masks={
                name: {"mask_data": mask, "class_labels": self._labels}
                for name, mask in masks.items()
                if mask is not None
            },
        )


def logged_in() -> bool:
    """Whether W&B finds a key: in the environment or in the netrc file; asks neither the network nor the user."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    server = os.environ.get("WANDB_BASE_URL")
    hosts = [urlsplit(server).netloc] if server else HOSTS
    places = [Path(os.environ["NETRC"])] if os.environ.get("NETRC") else [Path("~/.netrc"), Path("~/_netrc")]
    for place in places:
        with contextlib.suppress(OSError, RuntimeError, netrc.NetrcParseError):
            keys = netrc.netrc(place.expanduser())
            if any(keys.authenticators(host) for host in hosts):
                return True
    return False


def _mode(setting: str) -> str:
    if setting != "auto":
        return setting
    return os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")


def _seconds(variable: str, default: float) -> float:
    """W&B's own variable for a setting, which passing the setting would overrule."""
    return float(os.environ.get(variable) or default)


def _within(seconds: float, action: Callable[[], None]) -> None:
    """Do `action`, in a thread that is left behind with a `TimeoutError` if it takes longer; raises what it raises."""
    raised: list[Exception] = []

    def do() -> None:
        try:
            action()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=do, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer from its server within {seconds:.0f} s")
    if raised:
        raise raised[0]


def _import() -> Any:
    import wandb  # heavy, and only wanted when used

    return wandb
