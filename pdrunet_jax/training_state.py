"""The state of an optimizer between optax and PyTorch, bit for bit, in every direction.

PyTorch numbers an optimizer's arrays in the order of `model.parameters()`; optax keeps them in trees like the
parameters'. The names agree as follows: Adam's `exp_avg` is `mu`, `exp_avg_sq` is `nu`, `step` is `count`; SGD's
`momentum_buffer` is `trace`. optax counts the updates of the learning-rate schedule besides, as PyTorch's schedulers do
outside the optimizer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from pdrunet_jax.config import OptimConfig
from pdrunet_jax.errors import DataError
from pdrunet_jax.weights import DEAD_BLOCK, HWIO, OIHW, Entry

ADAM = {"exp_avg": "mu", "exp_avg_sq": "nu"}
SGD = {"momentum_buffer": "trace"}
"""PyTorch's name of an array beside each parameter: optax's."""

UNSUPPORTED = ("amsgrad", "maximize", "dampening", "capturable", "differentiable")
"""Options of PyTorch's optimizers that have no counterpart in ours: refused unless false or zero."""


def buffer_names(config: OptimConfig) -> Mapping[str, str]:
    """The arrays that the optimizer keeps beside each parameter: PyTorch's name to optax's."""
    if config.name != "sgd":
        return ADAM
    return SGD if config.momentum else {}


def to_torch(config: OptimConfig, rows: Sequence[Entry], opt_state: Any) -> dict[str, dict[str, np.ndarray]]:
    """What PyTorch keeps beside each parameter, by the parameter's public name.

    Args:
        config: which optimizer it is.
        rows: the parameters, as in `weights.table`.
        opt_state: optax's state, of `optim.make_optimizer`.

    Returns:
        For each row's public name: `exp_avg`, `exp_avg_sq` (the parameter's public shape) and `step` (scalar,
        float32, as PyTorch has it) for adam and adamw; `momentum_buffer` for sgd with momentum; nothing without.
    """
    names = buffer_names(config)
    result: dict[str, dict[str, np.ndarray]] = {row.public: {} for row in rows if names}
    for theirs, ours in names.items():
        leaves = dict(nnx.to_flat_state(optax.tree.get(opt_state, ours)))
        for row in rows:
            array = np.asarray(leaves[row.path][...])
            result[row.public][theirs] = np.array(np.transpose(array, OIHW) if array.ndim == 4 else array, order="C")
    if names is ADAM:
        for buffers in result.values():
            buffers["step"] = np.asarray(updates_done(opt_state), np.float32)
    return result


def updates_done(opt_state: Any) -> int:
    """The number of updates that optax's state has seen."""
    counts = {int(np.asarray(count)) for _, count in optax.tree.get_all_with_path(opt_state, "count")}
    if len(counts) != 1:
        raise ValueError(f"the optimizer's state counts {sorted(counts)} updates at once")
    return counts.pop()


def from_torch(
    config: OptimConfig, rows: Sequence[Entry], blank: Any, buffers: Mapping[str, Mapping[str, Any]], step: int
) -> Any:
    """Optax's state from what PyTorch keeps beside each parameter.

    Args:
        config: which optimizer it is.
        rows: the parameters, as in `weights.table`.
        blank: optax's state before the first update; its arrays say the dtypes.
        buffers: as `to_torch` returns; those of the dead block are passed over.
        step: updates done.

    Raises:
        DataError: names every array that is missing, unused, misshapen, of the wrong type or not finite, and every
            parameter whose `step` is another.
    """
    names = buffer_names(config)
    known = {*names, *(("step",) if names is ADAM else ())}
    public = {row.public for row in rows}
    problems = [f"{name} is no parameter of this network" for name in buffers if name not in public and not _dead(name)]
    trees: dict[str, Any] = {}
    for theirs, ours in names.items():
        states = {}
        blanks = dict(nnx.to_flat_state(optax.tree.get(blank, ours)))
        for row in rows:
            array = np.asarray(buffers.get(row.public, {}).get(theirs, np.nan))
            if problem := _problem(array, row, blanks[row.path][...].dtype, theirs in buffers.get(row.public, {})):
                problems.append(f"{theirs} of {row.public} {problem}")
                continue
            array = np.transpose(array, HWIO) if array.ndim == 4 else array
            states[row.path] = row.variable(np.array(array, order="C"))
        trees[ours] = states
    for row in rows:
        mine = buffers.get(row.public, {})
        problems += [f"{name} of {row.public} is unused by {config.name}" for name in mine if name not in known]
        if "step" in mine and int(np.asarray(mine["step"])) != step:
            problems.append(f"step of {row.public} is {int(np.asarray(mine['step']))}, not {step}")
    if problems:
        raise DataError(f"the optimizer's state does not fit {config.name} and this network", problems)

    filled = {ours: nnx.from_flat_state(states) for ours, states in trees.items()}
    return optax.tree.set(blank, **filled, count=np.asarray(step, np.int32))


def group_problems(config: OptimConfig, group: Mapping[str, Any]) -> list[str]:
    """What in a PyTorch parameter group contradicts `config`, a line each; the learning rate is the schedule's."""
    wanted: dict[str, Any] = {"weight_decay": config.weight_decay}
    if config.name == "sgd":
        wanted |= {"momentum": config.momentum, "nesterov": bool(config.momentum and config.nesterov)}
    else:
        wanted |= {"betas": (config.b1, config.b2), "eps": config.eps}
    if "decoupled_weight_decay" in group:
        wanted["decoupled_weight_decay"] = config.name == "adamw"
    problems = []
    for name, value in wanted.items():
        found = tuple(group[name]) if isinstance(group.get(name), list) else group.get(name)
        if found != value:
            problems.append(f"{name} is {found} in the file, {value} in the configuration")
    problems += [f"{name} is {group[name]}; it has no counterpart here" for name in UNSUPPORTED if group.get(name)]
    return problems


def _problem(array: np.ndarray, row: Entry, dtype: Any, present: bool) -> str | None:
    if not present:
        return f"is missing; its shape should be {row.shape}"
    if array.shape != row.shape:
        return f"has the shape {array.shape}; it should be {row.shape}"
    if array.dtype != dtype:
        return f"is {array.dtype}; it should be {jax.numpy.dtype(dtype)}"
    return None if bool(np.isfinite(array).all()) else "holds NaN or infinity"


def _dead(name: str) -> bool:
    return name.startswith(f"{DEAD_BLOCK}.")
