"""Checkpoints: which there are, which of them are whole, which are kept.

One checkpoint is a folder `checkpoints/STEP/` with two Orbax items and a digest: `state` (the training state as nested
dictionaries of arrays, named after its attributes and keys) and `meta` (step, data position, validation Dice and
whatever else the trainer keeps, as JSON). It is written under a temporary name, brought to the disk, sealed with its
digest and only then renamed, so that a folder named by a number was whole once.
"""

import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pdrunet_jax import config_io
from pdrunet_jax.checkpoint_items import fill, nested, read_meta, read_state, write_error, write_items
from pdrunet_jax.errors import RunError, UserError
from pdrunet_jax.files import sync
from pdrunet_jax.integrity import DIGEST, faults
from pdrunet_jax.runfolder import RunFolder

_WRITING, _REPLACED, _DELETED = "tmp-writing-", "tmp-replaced-", "tmp-deleted-"


@dataclass(frozen=True)
class Restored:
    """What a checkpoint gave back."""

    step: int
    state: Any
    position: dict[str, Any]
    extra: dict[str, Any]
    val_dice: float | None


class Checkpoints:
    """The checkpoints of one run: the latest few, and the best few by validation Dice.

    Opening them cleans up what a killed process left behind and checks every digest; only one process may write, which
    is what `RunFolder.lock` is for. Raises `RunError` that names the folder if the disk refuses.
    """

    def __init__(self, folder: Path, keep_latest: int, keep_best: int) -> None:
        self.folder = folder.absolute()  # Orbax takes no relative paths
        self.keep_latest = keep_latest
        self.keep_best = keep_best
        self._scores: dict[int, float | None] = {}
        self._damaged: dict[int, str] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._clean()
        except OSError as error:
            raise RunError(f"{error.filename or folder}: cannot be written ({error.strerror})") from None
        for step in checkpoint_steps(self.folder):
            if fault := _fault(self.folder / str(step)):
                self._damaged[step] = fault
            else:
                self._scores[step] = read_meta(self.folder / str(step))["val_dice"]

    def steps(self) -> list[int]:
        """Steps of the intact checkpoints, ascending."""
        return sorted(self._scores)

    def latest_step(self) -> int | None:
        """Step of the newest intact checkpoint."""
        return max(self._scores, default=None)

    def save(
        self,
        step: int,
        state: Any,
        position: Mapping[str, Any],
        extra: Mapping[str, Any] | None = None,
        val_dice: float | None = None,
    ) -> None:
        """Write the checkpoint of `step`, and delete those that are neither among the latest nor among the best.

        `state` is any pytree of arrays; `position` and `extra` are JSON-able. On return the checkpoint is on the disk.
        Raises `RunError` if it cannot be written; the earlier checkpoints are then as they were.
        """
        final, temporary = self.folder / str(step), self.folder / f"{_WRITING}{step}"
        score = None if val_dice is None or math.isnan(val_dice) else float(val_dice)
        meta = {"step": step, "position": dict(position), "extra": dict(extra or {}), "val_dice": score}
        arrays = nested(state)
        try:
            write_items(temporary, arrays, meta)
            if final.exists():
                replaced = self.folder / f"{_REPLACED}{step}"
                final.rename(replaced)
                temporary.rename(final)
                shutil.rmtree(replaced)
            else:
                temporary.rename(final)
            sync(self.folder)
            self._scores[step] = score
            self._thin_out()
        except (OSError, ValueError, RuntimeError) as error:  # Orbax reports a full disk as any of them
            for leftover in self.folder.glob(f"{temporary.name}*"):  # Orbax adds a suffix of its own while it writes
                shutil.rmtree(leftover, ignore_errors=True)
            raise RunError(
                f"cannot write the checkpoint {final}: {write_error(error)}; earlier checkpoints are intact"
            ) from error

    def restore(self, template: Any) -> Restored | None:
        """The newest intact checkpoint, with its state in the form of `template`; None if there are no checkpoints.

        `template` is a pytree of arrays or `jax.ShapeDtypeStruct`, as `save` was given; every array comes back bit for
        bit. Damaged checkpoints are named on standard error and set aside as `STEP.damaged`. Raises `UserError` if
        none is intact (nothing is changed then) and if the state has other names, shapes or types than `template`.
        """
        step = self.latest_step()
        if step is None:
            if not self._damaged:
                return None
            listing = "".join(f"\n  - {self.folder / str(step)}: {fault}" for step, fault in self._damaged.items())
            raise UserError(
                f"no checkpoint in {self.folder} is intact, so the run cannot be resumed:{listing}\n"
                "Bring back a copy of one of them, or start anew with another --workdir; nothing was overwritten."
            )
        folder = self.folder / str(step)
        meta = read_meta(folder)
        state = fill(template, read_state(folder), folder)
        for bad, fault in sorted(self._damaged.items()):
            aside = self.folder / f"{bad}.damaged"
            print(f"warning: checkpoint {self.folder / str(bad)} is damaged: {fault}; set aside as {aside.name}, "
                  f"resuming from step {step}", file=sys.stderr)  # fmt: skip
            _remove(aside)
            (self.folder / str(bad)).rename(aside)
        self._damaged.clear()
        return Restored(step, state, meta["position"], meta["extra"], meta["val_dice"])

    def _thin_out(self) -> None:
        latest = self.steps()[-self.keep_latest :]
        scored = [(score, -step) for step, score in self._scores.items() if score is not None]
        best = [-step for _, step in sorted(scored, reverse=True)[: self.keep_best]]  # of equal ones the earliest
        for step in self.steps():
            if step not in latest and step not in best:
                doomed = self.folder / f"{_DELETED}{step}"  # renamed first: half a deletion must not look like damage
                (self.folder / str(step)).rename(doomed)
                shutil.rmtree(doomed)
                del self._scores[step]

    def _clean(self) -> None:
        """Remove what a process that was killed while saving left behind."""
        for path in sorted(self.folder.glob("tmp-*")):
            original = self.folder / path.name.removeprefix(_REPLACED)
            if path.name.startswith(_REPLACED) and not original.exists():  # killed between the two renames
                path.rename(original)
            else:
                _remove(path)


def restore_weights(
    path: str | Path, which: Literal["best", "latest"] = "best"
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Weights of a checkpoint: parameters and statistics as nested dictionaries of NumPy arrays, and model options.

    `path` is a checkpoint (`RUN/checkpoints/STEP`) or a run folder, of which the intact checkpoint with the best
    validation Dice is taken, or the latest if `which` says so or none was validated; damaged ones are named on standard
    error. The average of the weights is taken where the run kept one. The options are `[model]` of the run's
    config.toml, then `extra["options"]` of the checkpoint. Raises `UserError` if there is no intact checkpoint.
    """
    folder = _choose_intact(Path(path), which)
    state, meta = read_state(folder), read_meta(folder)
    options: dict[str, Any] = {}
    config = RunFolder(folder.parent.parent).config
    if config.is_file():
        options = config_io.to_dict(config_io.read(config))["model"]
    params = state.get("ema") or state["params"]
    options |= meta["extra"].get("options", {})
    return params, state.get("stats", {}), options


def read_checkpoint(path: str | Path, template: Callable[[dict[str, Any]], Any]) -> Restored:
    """The state of a checkpoint, or of the newest intact one of a run folder, for reading only.

    `template` makes the form to return it in of the stored arrays, as in `Checkpoints.restore`. Raises `UserError` if
    there is no intact checkpoint, or if the state has other names, shapes or types.
    """
    folder = _choose_intact(Path(path), "latest")
    meta, arrays = read_meta(folder), read_state(folder)
    state = fill(template(arrays), arrays, folder)
    return Restored(meta["step"], state, meta["position"], meta["extra"], meta["val_dice"])


def run_of(path: str | Path) -> Path:
    """The run folder of a checkpoint; any other path is returned as it is."""
    path = Path(path)
    return path.absolute().parent.parent if path.name.isdecimal() and path.parent.name == "checkpoints" else path


def save_weights(
    run_folder: str | Path, params: Mapping[str, Any], stats: Mapping[str, Any], options: Mapping[str, Any]
) -> None:
    """Make a run folder that holds weights only: one checkpoint, of step 0, that `restore_weights` reads.

    Raises `UserError` if the folder holds checkpoints already.
    """
    run = RunFolder(run_folder)
    if run.checkpoints.is_dir() and any(run.checkpoints.iterdir()):
        raise UserError(f"{run.path} holds checkpoints already; give another folder")
    checkpoints = Checkpoints(run.checkpoints, keep_latest=1, keep_best=1)
    checkpoints.save(0, {"params": params, "stats": stats}, position={}, extra={"options": dict(options)})


def is_checkpoint(path: str | Path) -> bool:
    """Whether `path` is a checkpoint or a run folder that holds some, intact or not."""
    path = Path(path)
    return (
        (path / DIGEST).is_file()
        or bool(checkpoint_steps(path / "checkpoints"))
        or (path.is_dir() and path.name.isdecimal())
    )


def _choose_intact(path: Path, which: str) -> Path:
    """The checkpoint that is meant, its path absolute; raises `UserError` if it is damaged."""
    folder = _choose(path, which).absolute()
    if fault := _fault(folder):
        raise UserError(f"checkpoint {folder} is damaged: {fault}; take another one")
    return folder


def _choose(path: Path, which: str) -> Path:
    """The checkpoint that is meant by a checkpoint or run folder."""
    folder = path / "checkpoints"
    steps = checkpoint_steps(folder)
    if not steps:
        if is_checkpoint(path):
            return path
        raise UserError(f"{path} is neither a checkpoint nor a run folder with checkpoints")
    found = {step: _fault(folder / str(step)) for step in steps}
    for step, fault in found.items():
        if fault:
            print(f"warning: checkpoint {folder / str(step)} is damaged: {fault}", file=sys.stderr)
    intact = {step: read_meta(folder / str(step))["val_dice"] for step, fault in found.items() if not fault}
    if not intact:
        raise UserError(f"no checkpoint in {folder} is intact")
    scored = {step: score for step, score in intact.items() if score is not None and which == "best"}
    return folder / str(max(scored, key=lambda step: (scored[step], -step)) if scored else max(intact))


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of all checkpoints in a folder, intact or not: a file or a broken link there is damage, not nothing."""
    return sorted(int(path.name) for path in folder.glob("*") if re.fullmatch("0|[1-9][0-9]*", path.name))


def checkpoint_faults(folder: Path) -> list[str]:
    """Everything that is wrong with a checkpoint, file by file."""
    found = list(faults(folder))
    if found or not folder.name.isdecimal():  # a checkpoint may be copied under a name, but not under another number
        return found
    step = json.loads((folder / "meta" / "metadata").read_bytes())["step"]  # Orbax would take ten times as long
    return [] if folder.name == str(step) else [f"it is a copy of the checkpoint of step {step}"]


def _fault(folder: Path) -> str | None:
    """The first thing that is wrong with a checkpoint; None for an intact one."""
    return next(iter(checkpoint_faults(folder)), None)


def _remove(path: Path) -> None:
    """Remove whatever is at `path`."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
