"""A whole training, not its weights alone, between a run folder and a PyTorch `.pth`: stop here, go on there.

The `.pth` is a dictionary that PyTorch loads with `weights_only=True`: `model` and `optimizer` are the state dicts of
`torch.nn.Module` and `torch.optim.Optimizer`, `step` is the number of updates, `ema` the averaged parameters if the run
keeps them, and `pdrunet` a JSON text with the run's configuration and the fingerprint of its data.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pdrunet_jax import config_io
from pdrunet_jax.config import Config
from pdrunet_jax.errors import DataError, UserError
from pdrunet_jax.training_state import from_torch, group_problems, to_torch, updates_done
from pdrunet_jax.weights import WRAPPERS, Entry, from_public, read_weights, table, to_public, write_pth

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
    from pdrunet_jax.checkpoint import read_checkpoint, run_of
    from pdrunet_jax.runfolder import RunFolder

    run = RunFolder(run_of(src))
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
    from pdrunet_jax.checkpoint import Checkpoints
    from pdrunet_jax.data.pipeline import position_after
    from pdrunet_jax.progress import Progress
    from pdrunet_jax.runfolder import open_run

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
    from pdrunet_jax.step import build_model, create_state

    shapes = jax.eval_shape(lambda: create_state(config, build_model(config, outputs))[1])
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def _rate(config: Config, step: int) -> Any:
    from pdrunet_jax.optim import make_schedule

    return make_schedule(config.optim, config.train.steps)(step)


def _outputs(arrays: Mapping[str, Any], src: Path) -> int:
    try:
        return int(arrays["params"]["final_conv"]["bias"].shape[0])
    except (KeyError, TypeError):
        raise UserError(f"{src} holds no parameters of a PDR-UNet") from None


def _parameters(config: Config, public: Mapping[str, np.ndarray]) -> list[Entry]:
    last, first = public["final_conv.weight"], public["std_block.first.weight"]
    rows = table(first.shape[1], last.shape[0], last.shape[1], config.model.norm)
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
