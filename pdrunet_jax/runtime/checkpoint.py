"""Arrays to and from the disk through Orbax: a checkpoint's two items, and how their names become those of a state.

Checkpoints: which there are, which of them are whole, which are kept.

One checkpoint is a folder `checkpoints/STEP/` with two Orbax items and a digest: `state` (the training state as nested
dictionaries of arrays, named after its attributes and keys) and `meta` (step, data position, validation Dice and
whatever else the trainer keeps, as JSON). It is written under a temporary name, brought to the disk, sealed with its
digest and only then renamed, so that a folder named by a number was whole once.
"""

import errno
import json
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from pdrunet_jax.runtime.digest import DIGEST, faults, seal
from pdrunet_jax.runtime.errors import RunError, UserError
from pdrunet_jax.runtime.files import sync
from pdrunet_jax.runtime.processes import Group
from pdrunet_jax.runtime.run_folder import RunFolder


def _checkpointer() -> ocp.Checkpointer:
    # Of several processes only one saves, and any may restore: Orbax must not wait for the others.
    here = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=here, active_processes={here})
    handler = ocp.CompositeCheckpointHandler(
        state=ocp.PyTreeCheckpointHandler(multiprocessing_options=alone),
        meta=ocp.JsonCheckpointHandler(multiprocessing_options=alone),
        composite_options=ocp.CompositeOptions(multiprocessing_options=alone),
    )
    # The synchronous one: when `save` returns, Orbax has finished.
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def write_items(folder: Path, arrays: dict[str, Any], meta: dict[str, Any]) -> None:
    """Write both items of a checkpoint and seal them. Raises `OSError`, `ValueError` or `RuntimeError`."""
    shutil.rmtree(folder, ignore_errors=True)
    items = ocp.args.Composite(state=ocp.args.PyTreeSave(arrays), meta=ocp.args.JsonSave(meta))
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # Orbax logs a traceback for each of its threads besides raising the error
    try:
        with _checkpointer() as checkpointer:
            checkpointer.save(folder, args=items)
    finally:
        logger.setLevel(level)
    seal(folder)


def write_error(error: Exception) -> str:
    """Why a write failed, in a few words: TensorStore names its whole chain of files, and all of its settings."""
    text = str(error)
    known = (os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO))
    found = next((reason for reason in known if reason in text), "")
    return found or (isinstance(error, OSError) and error.strerror) or text.splitlines()[0].rsplit(": ", 1)[-1][:200]


def read_state(folder: Path) -> dict[str, Any]:
    """Nested dictionaries of NumPy arrays: what is stored decides the types, not JAX's present settings."""
    tree = ocp.PyTreeCheckpointHandler().metadata(folder.absolute() / "state").tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    items = ocp.args.Composite(state=ocp.args.PyTreeRestore(restore_args=as_numpy))
    with _checkpointer() as checkpointer:
        state: dict[str, Any] = checkpointer.restore(folder.absolute(), args=items).state
    return state


def read_meta(folder: Path) -> dict[str, Any]:
    """What `write_items` was given as `meta`."""
    with _checkpointer() as checkpointer:
        items = ocp.args.Composite(meta=ocp.args.JsonRestore())
        meta: dict[str, Any] = checkpointer.restore(folder.absolute(), args=items).meta
    return meta


def nested(state: Any) -> dict[str, Any]:
    """A pytree as nested dictionaries of NumPy arrays, named after its attributes and keys."""
    arrays: dict[str, Any] = {}
    for name, leaf in _named(state):
        inner = arrays
        for part in name[:-1]:
            inner = inner.setdefault(part, {})
        inner[name[-1]] = np.asarray(leaf)  # on the host: the checkpoint then fits any number of devices
    return arrays


def _named(tree: Any) -> list[tuple[tuple[str, ...], Any]]:
    """Leaves with their names: keys, attributes and positions; an NNX variable goes by its own name alone."""
    result = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
            path = path[:-1]
        result.append((tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path), leaf))
    return result


def fill(template: Any, stored: Mapping[str, Any], folder: Path) -> Any:
    """`template` with the stored arrays in place of its own, where it had them."""
    arrays = dict(_named(stored))
    wanted = dict(_named(template))
    problems = [f"{'/'.join(name)} is missing" for name in wanted.keys() - arrays.keys()]
    problems += [f"{'/'.join(name)} is not expected" for name in arrays.keys() - wanted.keys()]
    for name in wanted.keys() & arrays.keys():
        have, want = arrays[name], wanted[name]
        if (have.shape, have.dtype) != (want.shape, want.dtype):
            problems.append(f"{'/'.join(name)} is {have.dtype}{have.shape}, not {want.dtype}{want.shape}")
    if problems:
        shown = "".join(f"\n  - {problem}" for problem in sorted(problems)[:20])
        more = f"\n  - and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise UserError(f"checkpoint {folder} is of another model or optimizer, or holds weights only:{shown}{more}")
    leaves = [_place(arrays[name], want) for name, want in _named(template)]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _place(array: np.ndarray, like: Any) -> Any:
    if isinstance(like, np.ndarray):
        return array
    # Only an array that was bound to its device is bound again: the difference would compile the step a second time.
    sharding = like.sharding if getattr(like, "committed", False) else None
    return jax.device_put(array, sharding, may_alias=False)


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


def read_checkpoint(path: str | Path, template: Callable[[dict[str, Any]], Any]) -> Restored:
    """The state of a checkpoint, or of the newest intact one of a run folder, for reading only.

    `template` makes the form to return it in of the stored arrays, as in `Checkpoints.restore`. Raises `UserError` if
    there is no intact checkpoint, or if the state has other names, shapes or types.
    """
    folder = _choose_intact(Path(path), "latest")
    meta, arrays = read_meta(folder), read_state(folder)
    state = fill(template(arrays), arrays, folder)
    return Restored(meta["step"], state, meta["position"], meta["extra"], meta["val_dice"])


def run_folder_of(path: str | Path) -> Path:
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


class GroupCheckpoints:
    """The checkpoints of a run of several processes: the first one writes and reads them, and tells the others.

    Parameters are the same in every process, so that one of them has all there is to save; no other one needs to reach
    the folder. A checkpoint knows nothing of how many devices or processes there were.
    """

    def __init__(self, group: Group, folder: Path, keep_latest: int, keep_best: int) -> None:
        self._group = group
        self._own = Checkpoints(folder, keep_latest, keep_best) if group.is_main else None

    def latest_step(self) -> int | None:
        """As `Checkpoints.latest_step`, in the first process."""
        return None if self._own is None else self._own.latest_step()

    def restore(self, template: Any) -> Restored | None:
        """As `Checkpoints.restore`; but the state is `template` itself in every process but the first."""
        found = None if self._own is None else self._own.restore(template)
        about = {name: value for name, value in vars(found).items() if name != "state"} if found else {}
        about = json.loads(self._group.broadcast(json.dumps(about)))
        if not about:
            return None
        return Restored(state=found.state if found else template, **about)

    def save(
        self,
        step: int,
        state: Any,
        position: Mapping[str, Any],
        extra: Mapping[str, Any] | None = None,
        val_dice: float | None = None,
    ) -> None:
        """As `Checkpoints.save`, in the first process; the others need not wait: their next step does."""
        if self._own is not None:
            self._own.save(step, state, position, extra, val_dice)
