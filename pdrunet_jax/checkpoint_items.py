"""Arrays to and from the disk through Orbax: a checkpoint's two items, and how their names become those of a state."""

import errno
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from pdrunet_jax.errors import UserError
from pdrunet_jax.integrity import seal


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
