"""The state of an optimizer between optax and PyTorch, bit for bit, in every direction.

PyTorch numbers an optimizer's arrays in the order of `model.parameters()`; optax keeps them in trees like the
parameters'. The names agree as follows: Adam's `exp_avg` is `mu`, `exp_avg_sq` is `nu`, `step` is `count`; SGD's
`momentum_buffer` is `trace`. optax counts the updates of the learning-rate schedule besides, as PyTorch's schedulers do
outside the optimizer.

A whole training, not its weights alone, between a run folder and a PyTorch `.pth`: stop here, go on there.

The `.pth` is a dictionary that PyTorch loads with `weights_only=True`: `model` and `optimizer` are the state dicts of
`torch.nn.Module` and `torch.optim.Optimizer`, `step` is the number of updates, `ema` the averaged parameters if the run
keeps them, and `pdrunet` a JSON text with the run's configuration and the fingerprint of its data.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from pdrunet_jax import config as config_io
from pdrunet_jax.config import Config, OptimConfig
from pdrunet_jax.model.files import read_weights, write_pth
from pdrunet_jax.model.weights import DEAD_BLOCK, HWIO, OIHW, WRAPPERS, Entry, from_public, name_table, to_public
from pdrunet_jax.runtime.errors import DataError, UserError

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
        rows: the parameters, as in `weights.name_table`.
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
        rows: the parameters, as in `weights.name_table`.
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


HEADER = "pdrunet"
OPTIMIZER_KEYS = ("optimizer", "optimizer_state_dict", "optim")
PLAIN = 1e-12
"""Relative difference of two learning rates that are the same but for the rounding of the schedule."""


def is_training_state(content: Mapping[str, Any]) -> bool:
    """Whether the content of a `.pth` says by itself how a run folder goes on from it."""
    return HEADER in content and any(key in content for key in OPTIMIZER_KEYS)


def run_to_torch(src: Path, dst: Path) -> list[str]:
    """Write the newest state of the run folder (or the checkpoint) `src` to `dst`, a `.pth`; returns lines to print.

    Raises:
        UserError: `src` has no intact checkpoint of a training, or PyTorch is not installed.
        RunError: `dst` cannot be written.
    """
    from pdrunet_jax.runtime.checkpoint import read_checkpoint, run_folder_of
    from pdrunet_jax.runtime.run_folder import RunFolder

    run = RunFolder(run_folder_of(src))
    if not run.config.is_file():
        raise UserError(f"{src} is no run folder, nor a checkpoint in one: there is no {run.config}")
    config = config_io.read(run.config)
    with _precision(config):
        restored = read_checkpoint(src, lambda arrays: _template(config, _outputs(arrays, src)))
    state, step = restored.state, restored.step
    if updates_done(state.opt_state) != step:
        raise UserError(f"{src}: the optimizer has done {updates_done(state.opt_state)} updates at step {step}")

    arrays = to_public(state.params, state.stats)
    rows = _parameters(config, arrays)
    buffers = to_torch(config.optim, rows, state.opt_state)
    header = {"config": config_io.to_dict(config), "data": restored.extra.get("data", "")}
    content: dict[str, Any] = {
        "model": arrays,
        "optimizer": _optimizer(config, arrays, buffers, step, dst),
        "step": step,
        HEADER: json.dumps(header, sort_keys=True),
    }
    if state.ema is not None:
        averaged = to_public(state.ema, state.stats, dead_block=False)
        content["ema"] = {row.public: averaged[row.public] for row in rows}
    write_pth(dst, content)
    kept = ", ".join(sorted(next(iter(buffers.values()), {}))) or "nothing beside the parameters"
    return [
        f"{src}: step {step} of {config.train.steps}, {config.optim.name}",
        f"{dst}: model, optimizer ({kept}) and step; pdrunet_torch_ref.training_state reads it",
    ]


def torch_to_run(src: Path, dst: Path, config_name: str | None) -> list[str]:
    """Make the run folder `dst`, which training resumes, of the training in the `.pth` `src`; returns lines to print.

    `config_name` is a configuration as `--config` takes it; None takes the one in the file.

    Raises:
        UserError: `src` is no training state, contradicts the configuration, or there is none.
        DataError: names every array of weights or optimizer that does not fit.
        RunError: `dst` cannot be written.
    """
    from pdrunet_jax.data.pipeline import position_after
    from pdrunet_jax.runtime.checkpoint import Checkpoints
    from pdrunet_jax.train.progress import Progress
    from pdrunet_jax.train.run import open_run

    content = read_weights(src).arrays
    header = _header(content, src)
    config = config_io.load(config_name) if config_name else _stated_config(header, src)
    key = next((key for key in OPTIMIZER_KEYS if isinstance(content.get(key), Mapping)), None)
    if key is None:
        raise UserError(f"{src} holds no optimizer: without --config, its weights alone can be converted")
    imported = from_public(_model(content, src), str(src))
    _check_model(config, imported.options, src)
    public = to_public(imported.params, imported.stats, dead_block=False)
    rows = _parameters(config, public)

    buffers, group = _named_buffers(content[key], content, src)
    step = _step(content, buffers, src)
    problems = group_problems(config.optim, group)
    if problems:
        raise DataError(f"{src} was trained with another optimizer than the configuration has", problems)
    with _precision(config):
        template = _template(config, imported.options["outputs"])
        state = _filled(template, config, imported, rows, buffers, content.get("ema"), step, src)
        rate = float(_rate(config, step))
    notes = [f"  {note}" for note in imported.notes]
    if abs(float(group["lr"]) - rate) > PLAIN * rate:
        notes.append(f"  the file's learning rate is {group['lr']:g}; step {step} of the configuration has {rate:g}")
    if config.optim.ema and "ema" not in content:
        notes.append("  the file has no averaged parameters: the average starts anew from the parameters")

    run = open_run(dst, config)
    with run.lock():
        checkpoints = Checkpoints(run.checkpoints, config.train.keep_latest, config.train.keep_best)
        progress = Progress(data=header.get("data", ""))
        checkpoints.save(step, state, position_after(step), progress.to_dict())
    return [
        f"{src}: step {step}, {config.optim.name}",
        *notes,
        f"{dst}: a run folder at step {step} of {config.train.steps}; "
        f"python -m pdrunet_jax.train --config {config_name or dst / 'config.toml'} --workdir {dst} goes on",
    ]


def _precision(config: Config) -> Any:
    return jax.enable_x64(config.train.precision == "float64")


def _template(config: Config, outputs: int) -> Any:
    """The training state of `config` before its first step: zeros of the right names, shapes and types."""
    from pdrunet_jax.train.step import build_model, create_state

    shapes = jax.eval_shape(lambda: create_state(config, build_model(config, outputs))[1])
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def _rate(config: Config, step: int) -> Any:
    from pdrunet_jax.train.optim import make_schedule

    return make_schedule(config.optim, config.train.steps)(step)


def _outputs(arrays: Mapping[str, Any], src: Path) -> int:
    try:
        return int(arrays["params"]["final_conv"]["bias"].shape[0])
    except (KeyError, TypeError):
        raise UserError(f"{src} holds no parameters of a PDR-UNet") from None


def _parameters(config: Config, public: Mapping[str, np.ndarray]) -> list[Entry]:
    last, first = public["final_conv.weight"], public["std_block.first.weight"]
    rows = name_table(first.shape[1], last.shape[0], last.shape[1], config.model.norm)
    return [row for row in rows if row.parameter]


def _optimizer(
    config: Config, arrays: Mapping[str, np.ndarray], buffers: Mapping[str, Any], step: int, dst: Path
) -> dict[str, Any]:
    """The state dict of the optimizer; PyTorch itself says what a parameter group of its present version holds."""
    try:
        import torch
    except ImportError:
        raise UserError(f"{dst}: .pth files need PyTorch: pip install 'pdrunet-jax[torch]'") from None
    settings, names = config.optim, _parameter_names(arrays)
    parameters = [torch.nn.Parameter(torch.zeros(())) for _ in names]
    options: dict[str, Any] = {"lr": float(_rate(config, step)), "weight_decay": settings.weight_decay}
    if settings.name == "sgd":
        nesterov = bool(settings.momentum and settings.nesterov)
        optimizer: Any = torch.optim.SGD(parameters, momentum=settings.momentum, nesterov=nesterov, **options)
    else:
        kind = torch.optim.AdamW if settings.name == "adamw" else torch.optim.Adam
        optimizer = kind(parameters, betas=(settings.b1, settings.b2), eps=settings.eps, **options)
    state: dict[str, Any] = optimizer.state_dict()
    # The dead block never had a gradient, so PyTorch keeps nothing for it either.
    state["state"] = {i: dict(buffers[name]) for i, name in enumerate(names) if buffers.get(name)}
    return state


def _model(content: Mapping[str, Any], src: Path) -> Mapping[str, Any]:
    """The state dict of the network."""
    for key in WRAPPERS:
        if isinstance(content.get(key), Mapping):
            model: Mapping[str, Any] = content[key]
            return model
    raise UserError(f"{src} holds no state dict of a network under {', '.join(map(repr, WRAPPERS))}")


def _parameter_names(arrays: Mapping[str, Any]) -> list[str]:
    """Parameters in the order of `model.parameters()`, which is that of the state dict without its buffers."""
    return [name for name in arrays if name.endswith((".weight", ".bias"))]


def _named_buffers(
    optimizer: Mapping[str, Any], content: Mapping[str, Any], src: Path
) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """The optimizer's arrays by public name, and its one parameter group."""
    groups = optimizer.get("param_groups")
    if not isinstance(groups, list) or len(groups) != 1 or not isinstance(groups[0], Mapping) or "lr" not in groups[0]:
        raise UserError(f"{src}: the optimizer should have one parameter group with a learning rate")
    names = _parameter_names(_model(content, src))
    if len(groups[0].get("params", ())) != len(names):
        raise UserError(
            f"{src}: the optimizer was made for {len(groups[0].get('params', ()))} parameters, the model has "
            f"{len(names)}; it should be made of model.parameters(), all of them"
        )
    indices = {int(index): number for number, index in enumerate(groups[0]["params"])}
    state = optimizer.get("state", {})
    buffers = {
        names[indices[int(index)]]: {name: value for name, value in mine.items() if value is not None}
        for index, mine in state.items()
    }
    return buffers, groups[0]


def _step(content: Mapping[str, Any], buffers: Mapping[str, Mapping[str, Any]], src: Path) -> int:
    counts = {int(np.asarray(mine["step"])) for mine in buffers.values() if "step" in mine}
    stated = content.get("step", next(iter(counts), None))
    if stated is None:
        raise UserError(f"{src} does not say how many updates were done: store the number under 'step'")
    return int(np.asarray(stated))


def _header(content: Mapping[str, Any], src: Path) -> dict[str, Any]:
    try:
        header = json.loads(content.get(HEADER, "{}"))
    except (TypeError, json.JSONDecodeError):
        header = None
    if not isinstance(header, dict):
        raise UserError(f"{src}: {HEADER!r} in it is no JSON object")
    return header


def _stated_config(header: Mapping[str, Any], src: Path) -> Config:
    if "config" not in header:
        raise UserError(f"{src} does not say how it was trained: give --config NAME or a TOML file")
    return config_io.from_dict(header["config"], str(src))


def _check_model(config: Config, found: Mapping[str, Any], src: Path) -> None:
    stated = {name: getattr(config.model, name) for name in ("in_channels", "filters", "norm")}
    stated["outputs"] = config.model.outputs or found["outputs"]
    problems = [
        f"model.{name} is {value} in the configuration, {found[name]} in the file"
        for name, value in stated.items()
        if found[name] != value
    ]
    if problems:
        raise DataError(f"{src} holds another network than the configuration has", problems)


def _filled(
    template: Any,
    config: Config,
    imported: Any,
    rows: list[Entry],
    buffers: Mapping[str, Any],
    averaged: Mapping[str, Any] | None,
    step: int,
    src: Path,
) -> Any:
    """The training state, every array of the template's type."""
    kinds = {leaf.dtype for leaf in jax.tree.leaves(imported.params)}
    wanted = {leaf.dtype for leaf in jax.tree.leaves(template.params)}
    if kinds != wanted:
        raise UserError(
            f"{src} is in {kinds.pop()}, and --train.precision {config.train.precision} keeps parameters in "
            f"{wanted.pop()}"
        )
    ema = None
    if config.optim.ema:
        stats = to_public(imported.params, imported.stats, dead_block=False)
        ema = imported.params if averaged is None else from_public({**stats, **averaged}, f"{src}, ema").params
    opt_state = template.opt_state
    if step or buffers:  # PyTorch keeps nothing before the first update
        opt_state = from_torch(config.optim, rows, template.opt_state, buffers, step)
    return dataclasses.replace(
        template,
        params=imported.params,
        stats=imported.stats,
        opt_state=opt_state,
        ema=ema,
        step=np.asarray(step, np.int32),
    )
