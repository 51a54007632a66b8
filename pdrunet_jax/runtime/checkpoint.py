"""Checkpoint store: atomic writes, verification by digest, retention of the latest and the best.

A checkpoint is a folder `checkpoints/STEP/` with two Orbax items and a digest file: `state` (the training state as
nested dictionaries of arrays, named by attributes and keys) and `meta` (step, data position, validation Dice and the
caller's own values, as JSON). It is written under a temporary name, synced to disk, sealed with its digests and only
then renamed: a folder named by a number was complete once.
"""

# Why not Orbax's `CheckpointManager`: with orbax-checkpoint 0.12.8 these promises of docs/reliability.md would break.
# - Damage is found. The manager updates `_CHECKPOINT_METADATA`, adds `commit_success.txt` and renames the folder in one
#   call, with no public hook between. Digests written before it do not match. If the process is killed before they are
#   written after it, the checkpoint looks damaged.
# - A power cut repeats one save interval. The manager renames before JSON items and folders are synced.
# - A kill leaves no damage. The manager deletes an old checkpoint file by file under its number; with `todelete_subdir`
#   it renames first, but never frees the disk.
# - Nothing is skipped silently. It does not list a step whose folder became a file, and lists an empty one as complete.
# - A step can be saved again. The manager refuses.

import errno
import json
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from pdrunet_jax.runtime.digest import DIGEST, faults, seal
from pdrunet_jax.runtime.errors import DataError, RunError, UserError
from pdrunet_jax.runtime.files import sync, writing
from pdrunet_jax.runtime.processes import Group
from pdrunet_jax.runtime.run_folder import MOST_STEPS

_WRITING, _REPLACED, _DELETED = "tmp-writing-", "tmp-replaced-", "tmp-deleted-"


@dataclass(frozen=True)
class _Meta:
    """What a checkpoint says about itself."""

    __pydantic_config__ = ConfigDict(extra="ignore", allow_inf_nan=False)

    step: Annotated[int, Field(ge=0, le=MOST_STEPS)]
    position: dict[str, Any]
    extra: dict[str, Any]
    val_dice: float | None


@dataclass(frozen=True)
class Restored:
    """The contents of a checkpoint, as they were passed to `Checkpoints.save`."""

    step: int
    state: Any
    position: dict[str, Any]
    extra: dict[str, Any]
    val_dice: float | None


class Checkpoints:
    """The checkpoints of one run: the latest `keep_latest`, and the `keep_best` with the highest validation Dice.

    Opening the folder removes what a killed process left behind and verifies every digest. Only one run may write to
    it; `RunFolder.lock` ensures that. Raises `RunError` if the folder cannot be written.

    In a run of several processes only the main one of `group` accesses the folder. Parameters are the same in all of
    them, so it has everything there is to save. A checkpoint does not depend on the number of devices or processes.
    """

    def __init__(self, folder: Path, keep_latest: int, keep_best: int, group: Group | None = None) -> None:
        self.folder = folder.absolute()  # Orbax takes no relative paths
        self._group = group or Group()
        self.keep_latest = keep_latest
        self.keep_best = keep_best
        self._scores: dict[int, float | None] = {}
        self._damaged: dict[int, str] = {}
        if not self._group.is_main:
            return
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._clean()
        for step in checkpoint_steps(self.folder):
            found, meta = _inspect(self.folder / str(step))
            if found:
                self._damaged[step] = found[0]
            else:
                self._scores[step] = meta["val_dice"]

    def steps(self) -> list[int]:
        """Steps of the intact checkpoints, ascending; none outside the main process."""
        return sorted(self._scores)

    def latest_step(self) -> int | None:
        """Step of the newest intact checkpoint, or None; None outside the main process."""
        return max(self._scores, default=None)

    def save(
        self,
        step: int,
        state: Any,
        position: Mapping[str, Any],
        extra: Mapping[str, Any] | None = None,
        val_dice: float | None = None,
    ) -> None:
        """Write the checkpoint of `step`, then delete those that are neither among the latest nor among the best.

        `state` is any pytree of arrays; `position` and `extra` are JSON-serializable. On return the checkpoint is on
        disk; processes other than the main one return at once. Raises `RunError` if it cannot be written; earlier
        checkpoints are then unchanged.
        """
        if not self._group.is_main:
            return
        final, temporary = self.folder / str(step), self.folder / f"{_WRITING}{step}"
        score = None if val_dice is None or math.isnan(val_dice) else float(val_dice)
        meta = {"step": step, "position": dict(position), "extra": dict(extra or {}), "val_dice": score}
        named = {name: np.asarray(leaf) for name, leaf in _named(state).items()}  # NumPy arrays fit any devices
        arrays = traverse_util.unflatten_dict(named)
        try:
            _write(temporary, arrays, meta)
            if final.exists():
                replaced = self.folder / f"{_REPLACED}{step}"
                final.rename(replaced)
                temporary.rename(final)
                _remove(replaced)
            else:
                temporary.rename(final)
            sync(self.folder)
            self._scores[step] = score
            self._delete_old()
        except (OSError, ValueError, RuntimeError) as error:  # Orbax reports a full disk as any of them
            for leftover in self.folder.glob(f"{temporary.name}*"):  # Orbax appends a suffix while it writes
                shutil.rmtree(leftover, ignore_errors=True)
            raise RunError(
                f"cannot write the checkpoint {final}: {_reason(error)}; earlier checkpoints are intact"
            ) from error

    def restore(self, template: Any) -> Restored | None:
        """Restore the newest intact checkpoint, bit for bit; None if the folder holds no checkpoint at all.

        `template` is a pytree of arrays or `jax.ShapeDtypeStruct` with the structure that was saved; outside the main
        process it is itself the restored state. Damaged checkpoints are reported on standard error and set aside as
        `STEP.damaged`. Raises `UserError` if checkpoints exist but none is intact (nothing is changed), or if names,
        shapes or types differ from `template`.
        """
        restored = self._restore_newest(template) if self._group.is_main else None
        about = {name: value for name, value in vars(restored).items() if name != "state"} if restored else {}
        about = json.loads(self._group.broadcast(json.dumps(about)))
        return Restored(state=restored.state if restored else template, **about) if about else None

    def _restore_newest(self, template: Any) -> Restored | None:
        step = self.latest_step()
        if step is None:
            if not self._damaged:
                return None
            listing = "".join(f"\n  - {self.folder / str(step)}: {fault}" for step, fault in self._damaged.items())
            raise UserError(
                f"no checkpoint in {self.folder} is intact, so the run cannot be resumed:{listing}\n"
                "Restore one of them from a backup, or start over with another --workdir; nothing was overwritten."
            )
        folder = self.folder / str(step)
        restored = _restore(folder, lambda _: template)
        for bad, fault in sorted(self._damaged.items()):
            aside = self.folder / f"{bad}.damaged"
            print(f"warning: checkpoint {self.folder / str(bad)} is damaged: {fault}; set aside as {aside.name}, "
                  f"resuming from step {step}", file=sys.stderr)  # fmt: skip
            _remove(aside)
            (self.folder / str(bad)).rename(aside)
        self._damaged.clear()
        return restored

    def _delete_old(self) -> None:
        latest = self.steps()[-self.keep_latest :]
        scored = [(score, -step) for step, score in self._scores.items() if score is not None]
        best = [-step for _, step in sorted(scored, reverse=True)[: self.keep_best]]  # the earliest of equal ones
        for step in self.steps():
            if step not in latest and step not in best:
                doomed = self.folder / f"{_DELETED}{step}"  # renamed first: half a deletion must not look like damage
                (self.folder / str(step)).rename(doomed)
                _remove(doomed)
                del self._scores[step]

    def _clean(self) -> None:
        """Remove what a process that was killed while saving left behind."""
        for path in sorted(self.folder.glob("tmp-*")):
            original = self.folder / path.name.removeprefix(_REPLACED)
            if path.name.startswith(_REPLACED) and not original.exists():  # killed between the two renames
                path.rename(original)
            else:
                _remove(path)


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of all checkpoints in a folder, intact or not; a file or broken link named by a number is damage.

    Raises `RunError` if the folder exists but cannot be read.
    """
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise RunError(f"{folder}: cannot be read ({error.strerror}); check its owner and permissions") from None
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))


def checkpoint_faults(folder: Path) -> list[str]:
    """Describe everything that is wrong with a checkpoint, one entry for each file; empty for an intact one."""
    return _inspect(folder)[0]


def is_checkpoint(path: str | Path) -> bool:
    """Whether `path` is a checkpoint or a run folder with checkpoints, intact or not."""
    path = Path(path)
    itself = (path / DIGEST).is_file() or (path.is_dir() and path.name.isdecimal())
    return itself or bool(checkpoint_steps(path / "checkpoints"))


def choose_intact(path: Path, which: Literal["best", "latest"]) -> Path:
    """The absolute path of a checkpoint, or of the best or latest intact one of a run folder.

    Without validation scores the best is the latest. Damaged checkpoints of a run folder are reported on standard
    error. Raises `UserError` if no checkpoint is intact.
    """
    folder = (path / "checkpoints").absolute()
    steps = checkpoint_steps(folder)
    if not steps:
        if not is_checkpoint(path):
            raise UserError(f"{path} is neither a checkpoint nor a run folder with checkpoints")
        if found := checkpoint_faults(path.absolute()):
            raise UserError(f"checkpoint {path.absolute()} is damaged: {found[0]}; use another checkpoint")
        return path.absolute()
    scores: dict[int, float | None] = {}
    for step in steps:
        found, meta = _inspect(folder / str(step))
        if found:
            print(f"warning: checkpoint {folder / str(step)} is damaged: {found[0]}", file=sys.stderr)
        else:
            scores[step] = meta["val_dice"]
    if not scores:
        raise UserError(f"no checkpoint in {folder} is intact; restore one from a backup")
    scored = {step: score for step, score in scores.items() if score is not None and which == "best"}
    return folder / str(max(scored, key=lambda step: (scored[step], -step)) if scored else max(scores))


def read_checkpoint(path: str | Path, template: Callable[[dict[str, Any]], Any]) -> Restored:
    """Read a checkpoint, or the newest intact one of a run folder, without changing anything.

    `template` maps the stored arrays (nested dictionaries) to the pytree to return them in, as in
    `Checkpoints.restore`. Raises `UserError` if no checkpoint is intact, or if names, shapes or types differ.
    """
    return _restore(choose_intact(Path(path), "latest"), template)


def read_state(folder: Path) -> dict[str, Any]:
    """Nested dictionaries of NumPy arrays; their types are the stored ones, whatever precision JAX is set to.

    Raises `UserError` for arrays that cannot be read, and for over 256 MiB of them in files of less than a hundredth:
    weights hardly compress.
    """
    with _reading(folder):
        tree = ocp.PyTreeCheckpointHandler().metadata(folder.absolute() / "state").tree
        declared = sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
    stored = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if declared > max(100 * stored, 1 << 28):
        raise UserError(
            f"checkpoint {folder} is refused as a bomb: {declared:,} bytes of arrays in {stored:,} of files"
        )
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    items = ocp.args.Composite(state=ocp.args.PyTreeRestore(restore_args=as_numpy))
    with _reading(folder), _checkpointer() as checkpointer:
        state: dict[str, Any] = checkpointer.restore(folder.absolute(), args=items).state
    if "halted" in state:  # the name of `diverged` in checkpoints of earlier versions
        state["diverged"] = state.pop("halted")
    if state.get("ema") and "stats" in state:  # earlier versions kept no average of the statistics
        state.setdefault("ema_stats", state["stats"])
    return state


def read_meta(folder: Path) -> dict[str, Any]:
    """Step, position, extra values and validation Dice of a checkpoint. Raises `UserError` if they are not valid."""
    with _reading(folder), _checkpointer() as checkpointer:
        items = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return vars(TypeAdapter(_Meta).validate_python(checkpointer.restore(folder.absolute(), args=items).meta))


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Turn any failure of Orbax to read what is in `folder` into a `UserError`."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "metadata"
        raise UserError(f"checkpoint {folder}: its {where} is not valid ({first['msg']})") from None
    except (UserError, MemoryError):
        raise
    except Exception as error:  # which ones depends on Orbax and on TensorStore
        raise UserError(f"checkpoint {folder} cannot be read: {_reason(error)}") from None


def _inspect(folder: Path) -> tuple[list[str], dict[str, Any]]:
    """Faults of a checkpoint; the metadata of an intact one."""
    if found := list(faults(folder)):
        return found, {}
    try:
        meta = read_meta(folder)
    except UserError as error:
        return [str(error)], {}
    if folder.name.isdecimal() and folder.name != str(meta["step"]):  # copies may have names, but no other numbers
        found = [f"it is a copy of the checkpoint of step {meta['step']}"]
    return found, meta


def _restore(folder: Path, template: Callable[[dict[str, Any]], Any]) -> Restored:
    meta, arrays = read_meta(folder), read_state(folder)
    state = _fill(template(arrays), arrays, folder)
    return Restored(meta["step"], state, meta["position"], meta["extra"], meta["val_dice"])


def _checkpointer() -> ocp.Checkpointer:
    """A synchronous checkpointer: when `save` returns, Orbax has finished."""
    # Of several processes only one saves, and any may restore: Orbax must not wait for the others.
    here = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=here, active_processes={here})
    handler = ocp.CompositeCheckpointHandler(
        state=ocp.PyTreeCheckpointHandler(multiprocessing_options=alone),
        meta=ocp.JsonCheckpointHandler(multiprocessing_options=alone),
        composite_options=ocp.CompositeOptions(multiprocessing_options=alone),
    )
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _write(folder: Path, arrays: dict[str, Any], meta: dict[str, Any]) -> None:
    """Write both items and seal them. Raises `OSError`, `ValueError` or `RuntimeError`."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        _require_room(folder, sum(array.nbytes for array in jax.tree.leaves(arrays)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    items = ocp.args.Composite(state=ocp.args.PyTreeSave(arrays), meta=ocp.args.JsonSave(meta))
    logger = logging.getLogger("absl")
    level = logger.level
    # Orbax raises an error and also logs a traceback for each of its threads, some of them later: after a failure the
    # level stays.
    logger.setLevel(logging.CRITICAL)
    with _checkpointer() as checkpointer:
        checkpointer.save(folder, args=items)
    logger.setLevel(level)
    seal(folder)


def _require_room(folder: Path, size: int) -> None:
    """Make more files than a checkpoint of `size` bytes has entries, and as large in all. Raises `OSError`.

    If the disk is full, or no more files may be opened (12 at a time are needed), some of Orbax's threads wait for
    5 minutes, and TensorStore's print tracebacks.
    """
    folder.mkdir(parents=True)
    with ExitStack() as held:
        for _ in range(16):
            held.enter_context(open(os.devnull))
        for number in range(40):
            with (folder / str(number)).open("xb") as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size // 40 + 8192)


def _reason(error: Exception) -> str:
    """Why a write failed, in a few words: TensorStore's message lists all of its files and settings."""
    text = str(error)
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EMFILE)
    known = (os.strerror(number) for number in numbers)
    found = next((reason for reason in known if reason in text), "")
    return (
        found
        or (isinstance(error, OSError) and error.strerror)
        or (text.splitlines() or [type(error).__name__])[0].rsplit(": ", 1)[-1][:200]
    )


def _named(tree: Any) -> dict[tuple[str, ...], Any]:
    """Leaves by keys, attributes and positions, in the order of the tree; an NNX variable has its own name alone."""
    result = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
            path = path[:-1]
        result[tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path)] = leaf
    return result


def _fill(template: Any, stored: Mapping[str, Any], folder: Path) -> Any:
    """Replace the leaves of `template` by the stored arrays, each on the device of the leaf that it replaces."""
    arrays, wanted = _named(stored), _named(template)
    problems = [f"{'/'.join(name)} is missing" for name in wanted.keys() - arrays.keys()]
    problems += [f"{'/'.join(name)} is not expected" for name in arrays.keys() - wanted.keys()]
    for name in wanted.keys() & arrays.keys():
        have, want = arrays[name], wanted[name]
        if (have.shape, have.dtype) != (want.shape, want.dtype):
            problems.append(f"{'/'.join(name)} is {have.dtype}{have.shape}, not {want.dtype}{want.shape}")
    if problems:
        raise DataError(
            f"checkpoint {folder} is of another model or optimizer, or holds weights only", sorted(problems)
        )
    leaves = [_place(arrays[name], want) for name, want in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _place(array: np.ndarray, like: Any) -> Any:
    if isinstance(like, np.ndarray):
        return array
    # Commit the array to a device only if `like` was committed; otherwise the step would compile a second time.
    sharding = like.sharding if getattr(like, "committed", False) else None
    return jax.device_put(array, sharding, may_alias=False)


def _remove(path: Path) -> None:
    """Remove a file, link or folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
