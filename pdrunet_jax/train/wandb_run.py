"""Weights & Biases (W&B) run of a run folder.

No failure of W&B reaches training: every call runs in a daemon thread with a time limit. A server that refuses, fails
or hangs costs at most a minute in total, and data that is not uploaded stays in the run folder for `wandb sync`. W&B's
service process ends with the run. Only if the server stops answering during the last requests may the service outlive
training, until it gives up retrying them.
"""

import netrc
import os
import secrets
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from pdrunet_jax.config import Config, TrackingConfig, to_dict
from pdrunet_jax.runtime.files import atomic_write
from pdrunet_jax.runtime.opening import read_text
from pdrunet_jax.runtime.run_folder import RunFolder

INIT_TIMEOUT = 15
"""Seconds for the server to answer at the start, unless WANDB_INIT_TIMEOUT is set."""
FINISH_TIMEOUT = 25
"""Seconds to upload what is left at the end, unless WANDB_FINISH_TIMEOUT is set."""
CALL_TIMEOUT = 10
"""Seconds for each other call."""
GRACE = 5
"""Seconds for the server to answer a first request at the end, and for W&B to keep its own limits."""

HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")
"""Hosts under which `wandb login` may have stored a key."""

SETTINGS: dict[str, Any] = {
    "console": "off",
    "silent": True,
    "disable_git": True,  # a patch or a remote's address may hold secrets
    "disable_code": True,
    "save_code": False,
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "x_save_requirements": False,
    "finish_timeout_raises": True,
}


@dataclass(frozen=True)
class Picture:
    """An image with its masks for W&B's viewer.

    `image` is (H, W), (H, W, 1) or (H, W, 3) uint8; `prediction` and `truth` are (H, W) uint8 class indices, or layers
    (H, W, K) of overlapping classes, which the viewer shows as masks of their own.
    """

    name: str
    image: np.ndarray
    prediction: np.ndarray
    truth: np.ndarray


ScoreTable = tuple[Sequence[str], Sequence[Sequence[Any]]]
"""Column names and rows; NaN for an undefined score."""


class WandbRun:
    """The W&B run of a run folder; a resumed run continues under the same id. No method raises.

    `labels` names the class indices of pictures. If the server cannot be reached at the start, the run is offline.
    """

    def __init__(self, run: RunFolder, config: Config, labels: Mapping[int, str]) -> None:
        self._folder = run
        self._config = config
        self._labels = dict(labels)
        self._wandb: Any = None  # the module, imported if W&B is enabled
        self._run: Any = None
        self._failed = False
        self._scores: tuple[int, str, Mapping[str, float], ScoreTable, Iterable[Picture]] | None = None
        mode: str = config.tracking.wandb
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")
            mode = {"dryrun": "offline", "run": "online"}.get(mode, mode)  # W&B's names of old
        if mode != "disabled":
            self._start(mode)
        if mode == "online" and self._run is None:
            mode = "offline"
            self._start(mode)
        self._online = mode == "online"

    @property
    def place(self) -> str:
        """One line that says where to find the run; empty if there is none."""
        if self._run is None:
            return ""
        if self._online:
            return f"W&B: {self._run.url}"
        return f"W&B: offline; upload later with: wandb sync {self._folder.wandb}/offline-run-*"

    def log(self, step: int, metrics: Mapping[str, Any], pictures: Iterable[Picture] = ()) -> None:
        """Log the metrics of a step; `pictures` are logged as `val/images`."""

        def log() -> None:
            images = [self._image(picture) for picture in pictures]
            self._run.log({**metrics, "val/images": images} if images else dict(metrics), step=step)

        if self._run is not None and not self._failed:
            self._attempt("log", CALL_TIMEOUT, log)

    def scores(
        self, step: int, split: str, summary: Mapping[str, float], table: ScoreTable, pictures: Iterable[Picture]
    ) -> None:
        """Take the final scores of `split`, which `finish` logs at `step` as `SPLIT/...`: summary, table, pictures."""
        self._scores = step, split, summary, table, pictures

    def finish(self, status: str, message: str = "") -> None:
        """Upload what is left and close; `status` is "finished", "stopped" or "failed".

        An online run that was not stopped sends an alert with `message`.
        """
        if self._run is None:
            return
        run, code = self._run, 1 if status == "failed" else 0
        if not self._failed:
            self._attempt("log the final scores", CALL_TIMEOUT, lambda: self._log_last(status, message))
        self._attempt("finish", run.settings.finish_timeout + GRACE, lambda: run.finish(exit_code=code))
        # W&B would otherwise wait for its service at exit, without a limit.
        self._attempt("end its service", GRACE, self._wandb.teardown)
        self._run = None

    def _start(self, mode: str) -> None:
        self._failed = False
        limit = _seconds("WANDB_INIT_TIMEOUT", INIT_TIMEOUT) + 2 * GRACE
        self._run = self._attempt(f"start {mode}", limit, lambda: self._init(mode))
        if self._run is None and self._wandb is not None:
            # The service would keep the id for the attempt that failed.
            self._attempt("end its service", GRACE, self._wandb.teardown)

    def _init(self, mode: str) -> Any:
        cache = str((self._folder.wandb / "cache").absolute())
        environment = dict.fromkeys(("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"), cache)
        for name, value in {**environment, "WANDB_ERROR_REPORTING": "false"}.items():  # no settings exist for these
            os.environ.setdefault(name, value)
        import wandb

        self._wandb = wandb
        tracking = self._config.tracking
        id_file = self._folder.wandb / "id"
        if not id_file.is_file():
            id_file.parent.mkdir(parents=True, exist_ok=True)
            given = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None  # by a sweep's agent
            atomic_write(id_file, given or secrets.token_hex(4))
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or tracking.project
            if tracking.project == TrackingConfig().project
            else tracking.project,
            entity=tracking.entity,  # None leaves it, like the tags, to W&B and its environment variables
            name=tracking.name or os.environ.get("WANDB_NAME") or self._folder.path.absolute().name,
            tags=tracking.tags or None,
            dir=str(self._folder.path.absolute()),
            config=to_dict(self._config),
            id=read_text(id_file).strip(),
            resume="allow",  # offline too: a later part would replace the earlier ones when they are synced
            mode=mode,  # type: ignore[arg-type]
            settings=wandb.Settings(
                init_timeout=_seconds("WANDB_INIT_TIMEOUT", INIT_TIMEOUT),
                login_timeout=_seconds("WANDB_LOGIN_TIMEOUT", INIT_TIMEOUT),
                finish_timeout=_seconds("WANDB_FINISH_TIMEOUT", FINISH_TIMEOUT),
                **SETTINGS,
            ),
        )
        for name in ("train/dice", "val/dice", "val/iou"):
            run.define_metric(name, summary="max")
        for name in ("train/loss", "val/loss"):
            run.define_metric(name, summary="min")
        return run

    def _log_last(self, status: str, message: str) -> None:
        run = self._run
        if self._scores is not None:
            step, split, summary, (columns, rows), pictures = self._scores
            step = max(run.step, step)
            run.summary.update({f"{split}/{name}": value for name, value in summary.items() if value == value})
            if images := [self._image(picture) for picture in pictures]:
                run.log({f"{split}/images": images}, step=step)
        # W&B retries the requests below without a limit; this one raises if the server does not answer.
        if self._online:
            self._wandb.Api(timeout=GRACE)
        if self._scores is not None:
            cells = [[None if cell != cell else cell for cell in row] for row in rows]
            run.log({f"{split}/per_image": self._wandb.Table(columns=list(columns), data=cells)}, step=step)
        if self._online and status != "stopped":
            run.alert(title=f"{run.name}: {status}", text=message or status)
        if status == "finished" and self._config.tracking.artifact and self._folder.best.is_file():
            artifact = self._wandb.Artifact(f"{run.id}-best", type="model")
            artifact.add_file(str(self._folder.best))
            run.log_artifact(artifact)

    def _image(self, picture: Picture) -> Any:
        masks = {"prediction": picture.prediction, "truth": picture.truth}
        if picture.truth.ndim == 3:
            masks = {
                f"{kind} {self._labels[index]}": (layers[..., index - 1] == 1) * np.uint8(index)
                for kind, layers in masks.items()
                for index in range(1, layers.shape[-1] + 1)
            }
        layers = {name: {"mask_data": mask, "class_labels": self._labels} for name, mask in masks.items()}
        return self._wandb.Image(picture.image.squeeze(), caption=picture.name, masks=layers)

    def _attempt(self, action: str, seconds: float, function: Callable[[], Any]) -> Any:
        """Return what `function` does; None, with a warning the first time, if it raises or takes too long."""
        outcome: list[tuple[Any, BaseException | None]] = []

        def target() -> None:
            try:
                outcome.append((function(), None))
            except (Exception, SystemExit) as error:  # W&B exits with the code of its service
                outcome.append((None, error))

        thread = threading.Thread(target=target, daemon=True)
        thread.start()
        thread.join(seconds)
        result, error = outcome[0] if outcome else (None, TimeoutError(f"no answer within {seconds:.0f} s"))
        if error is not None and not self._failed:
            self._failed = True
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            kept = f"training is not affected; what was not uploaded is in {self._folder.wandb}, for wandb sync"
            print(f"warning: W&B could not {action}: {reason}; {kept}", file=sys.stderr)
        return result


def logged_in() -> bool:
    """Return whether the environment or the netrc file holds a W&B key, without a request or a prompt."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    server = os.environ.get("WANDB_BASE_URL")
    try:
        keys = netrc.netrc(os.environ.get("NETRC") or os.path.expanduser("~/.netrc"))
    except (OSError, netrc.NetrcParseError):
        return False
    return any(keys.authenticators(host) for host in ([urlsplit(server).netloc] if server else HOSTS))


def _seconds(variable: str, default: float) -> float:
    """The number of seconds in an environment variable of W&B, which an explicit setting would override."""
    try:
        return float(os.environ.get(variable, ""))
    except ValueError:
        return default
