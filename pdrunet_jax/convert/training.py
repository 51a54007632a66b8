"""Convert a training run between a run folder and a PyTorch `.pth`: stop in one framework, resume in the other.

The `.pth` is a dictionary that PyTorch loads with `weights_only=True`: `model` and `optimizer` are the state dicts of
`torch.nn.Module` and `torch.optim.Optimizer`, `step` is the number of updates, `ema` the averaged parameters if the run
keeps them, and `pdrunet` a JSON text with the configuration and the fingerprint of the dataset.

The optimizer state is carried over bit for bit. PyTorch numbers its arrays in the order of `model.parameters()`, optax
keeps them in trees like the parameters': Adam's `exp_avg` is `mu`, `exp_avg_sq` is `nu`, `step` is `count`; SGD's
`momentum_buffer` is `trace`. optax also counts the updates of the learning-rate schedule, as PyTorch's schedulers do
outside the optimizer.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from numpy.typing import DTypeLike

from pdrunet_jax import config as configuration
from pdrunet_jax.config import Config, OptimConfig
from pdrunet_jax.data.pipeline import position_after
from pdrunet_jax.model.files import write_pth
from pdrunet_jax.model.load import find_run
from pdrunet_jax.model.state_dict import find_state_dict
from pdrunet_jax.model.torch_files import import_torch
from pdrunet_jax.model.weights import DEAD_BLOCK, Entry, Imported, from_public, parameter_table, to_public
from pdrunet_jax.runtime.checkpoint import Checkpoints, read_checkpoint
from pdrunet_jax.runtime.errors import DataError, UserError
from pdrunet_jax.train.freeze import is_frozen
from pdrunet_jax.train.optim import make_schedule
from pdrunet_jax.train.progress import Progress
from pdrunet_jax.train.run import open_run
from pdrunet_jax.train.step import TrainState, build_model, create_state

HEADER = "pdrunet"
OPTIMIZER_KEYS = ("optimizer", "optimizer_state_dict", "optim", "optimizer_states")
STEP_KEYS = ("step", "global_step")

ADAM = {"exp_avg": "mu", "exp_avg_sq": "nu"}
SGD = {"momentum_buffer": "trace"}
"""Optimizer arrays kept for each parameter: PyTorch's name to optax's."""

UNSUPPORTED = ("amsgrad", "maximize", "dampening", "capturable", "differentiable")
"""PyTorch optimizer options without a counterpart here; rejected unless false or zero."""

RATE_TOLERANCE = 1e-12
"""Relative difference of learning rates that is only rounding in the schedule."""


class TorchTraining(NamedTuple):
    """A training run as a `.pth` contains it."""

    weights: Imported
    buffers: Mapping[str, Mapping[str, Any]]
    """Optimizer arrays by the public name of their parameter."""
    group: Mapping[str, Any]
    """The optimizer's parameter group."""
    step: int
    """Updates done."""
    ema: Mapping[str, Any] | None
    """Averaged parameters and, if the file has them, running statistics by public name."""


def is_training_state(content: Mapping[str, Any]) -> bool:
    """Whether the content of a `.pth` includes an optimizer and its own configuration."""
    return HEADER in content and any(key in content for key in OPTIMIZER_KEYS)


def run_to_torch(src: Path, dst: Path) -> list[str]:
    """Write the latest state of the run folder (or the checkpoint) `src` to `dst`, a `.pth`; returns lines to print.

    Raises:
        UserError: `src` contains no intact checkpoint of a training run, or PyTorch is not installed.
        RunError: `dst` cannot be written.
    """
    run = find_run(src)
    if run is None:
        raise UserError(f"{src} is neither a run folder nor a checkpoint in one: there is no config.toml")
    config = configuration.read(run.config_file)
    with jax.enable_x64(config.train.precision == "float64"):
        restored = read_checkpoint(src, lambda arrays: _blank_state(config, _outputs(arrays, src)))
    state, step = restored.state, restored.step
    if updates_done(state.opt_state) != step:
        raise UserError(f"{src}: the optimizer has done {updates_done(state.opt_state)} updates at step {step}")

    arrays = to_public(state.params, state.stats)
    rows = parameter_table(config.model, arrays["final_conv.bias"].shape[0])
    buffers = to_torch(config.optim, _trained(rows, config), state.opt_state)
    header = {"config": configuration.to_dict(config), "data": restored.extra.get("data", "")}
    content: dict[str, Any] = {
        "model": arrays,
        "optimizer": _optimizer(config, _parameter_names(arrays), buffers, step, dst),
        "step": step,
        HEADER: json.dumps(header, sort_keys=True),
    }
    if state.ema is not None:
        content["ema"] = to_public(*state.weights, dead_block=False)
    write_pth(dst, content)
    kept = ", ".join(sorted(next(iter(buffers.values()), {}))) or "no arrays"
    return [
        f"{src}: step {step} of {config.train.steps}, {config.optim.name}",
        f"{dst}: model, optimizer ({kept}) and step; load it with pdrunet_torch_ref.training_state",
    ]


def torch_to_run(content: Mapping[str, Any], src: Path, dst: Path, config_name: str | None) -> list[str]:
    """Make the run folder `dst`, which training resumes, from the `content` of a `.pth`; returns lines to print.

    `config_name` is a configuration as `--config` takes it; None takes the file's own.

    Raises:
        UserError: `src` contains no training run, contradicts the configuration, or there is no configuration.
        DataError: Arrays of weights or optimizer do not fit; lists all of them.
        RunError: `dst` cannot be written.
    """
    config, fingerprint = _configuration(content, src, config_name)
    training = _read_training(content, src)
    if not 0 <= training.step <= config.train.steps:
        raise UserError(
            f"{src} is at step {training.step}, and the configuration ends at train.steps = {config.train.steps}: "
            "there is nothing to go on with. Give a --config with more steps, or convert the weights alone: save "
            "`model.state_dict()`"
        )
    _check_model(config, training.weights.options, src)
    if problems := _group_problems(config.optim, training.group):
        raise DataError(f"{src} was trained with a different optimizer than the configuration's", problems)
    with jax.enable_x64(config.train.precision == "float64"):
        state = _train_state(config, training, src)
        rate = float(make_schedule(config.optim, config.train.steps)(training.step))

    step, stated_rate = training.step, float(training.group["lr"])
    notes = [f"  {note}" for note in training.weights.notes]
    if abs(stated_rate - rate) > RATE_TOLERANCE * rate:
        notes.append(f"  the file's learning rate is {stated_rate:g}; the configuration's at step {step} is {rate:g}")
    if config.optim.ema and training.ema is None:
        notes.append("  the file contains no averaged parameters: the average restarts from the parameters")

    run = open_run(dst, config)
    with run.lock():
        checkpoints = Checkpoints(run.checkpoints, config.train.keep_latest, config.train.keep_best)
        checkpoints.save(step, state, position_after(step), Progress(data=fingerprint).to_dict())
        run.note_checkpoint()
    return [
        f"{src}: step {step}, {config.optim.name}",
        *notes,
        f"{dst}: a run folder at step {step} of {config.train.steps}; resume with "
        f"python -m pdrunet_jax.train --config {config_name or dst / 'config.toml'} --workdir {dst}",
    ]


def to_torch(config: OptimConfig, rows: Sequence[Entry], opt_state: optax.OptState) -> dict[str, dict[str, np.ndarray]]:
    """PyTorch's optimizer arrays by the public name of their parameter; `rows` are those of `weights.name_table`.

    For adam and adamw `exp_avg`, `exp_avg_sq` (in the parameter's public shape) and `step` (scalar, float32, as in
    PyTorch); `momentum_buffer` for sgd with momentum; nothing for sgd without.
    """
    names = _buffer_names(config)
    result: dict[str, dict[str, np.ndarray]] = {row.public: {} for row in rows if names}
    for theirs, ours in names.items():
        leaves = dict(nnx.to_flat_state(optax.tree.get(opt_state, ours)))
        for row in rows:
            result[row.public][theirs] = np.array(row.to_public(np.asarray(leaves[row.path][...])), order="C")
    if names is ADAM:
        for buffers in result.values():
            buffers["step"] = np.asarray(updates_done(opt_state), np.float32)
    return result


def from_torch(
    config: OptimConfig,
    rows: Sequence[Entry],
    blank: optax.OptState,
    buffers: Mapping[str, Mapping[str, Any]],
    step: int,
) -> optax.OptState:
    """Optax's state from PyTorch's optimizer arrays, the inverse of `to_torch`.

    `blank` is the state before the first update and determines the dtypes; buffers of the dead block are ignored.
    Raises `DataError` that lists every array that is missing, unused, not finite, or of the wrong shape or dtype, and
    every parameter whose `step` is not `step`.
    """
    names = _buffer_names(config)
    known = {*names, *(("step",) if names is ADAM else ())}
    public = {row.public for row in rows}
    unknown = [name for name in buffers if name not in public and not name.startswith(f"{DEAD_BLOCK}.")]
    problems = [f"{name} is not a parameter of this network" for name in unknown]
    trees: dict[str, nnx.State[Any, Any]] = {}
    for theirs, ours in names.items():
        states: dict[Any, Any] = {}
        blanks = dict(nnx.to_flat_state(optax.tree.get(blank, ours)))
        for row in rows:
            given = buffers.get(row.public, {}).get(theirs)
            if problem := _problem(given, row, blanks[row.path][...].dtype):
                problems.append(f"{theirs} of {row.public} {problem}")
                continue
            states[row.path] = row.variable(np.array(row.to_flax(np.asarray(given)), order="C"))
        trees[ours] = nnx.from_flat_state(states)
    for row in rows:
        mine = buffers.get(row.public, {})
        problems += [f"{name} of {row.public} is unused by {config.name}" for name in mine if name not in known]
        if "step" in mine and int(np.asarray(mine["step"])) != step:
            problems.append(f"step of {row.public} is {int(np.asarray(mine['step']))}, not {step}")
    if problems:
        raise DataError(f"the optimizer state does not fit {config.name} and this network", problems)
    return optax.tree.set(blank, **trees, count=np.asarray(step, np.int32))


def updates_done(opt_state: optax.OptState) -> int:
    """Number of updates counted by optax's state."""
    counts = {int(np.asarray(count)) for _, count in optax.tree.get_all_with_path(opt_state, "count")}
    if len(counts) != 1:
        raise ValueError(f"the optimizer state has contradictory counts of updates: {sorted(counts)}")
    return counts.pop()


def _buffer_names(config: OptimConfig) -> Mapping[str, str]:
    if config.name != "sgd":
        return ADAM
    return SGD if config.momentum else {}


def _group_options(config: OptimConfig) -> dict[str, Any]:
    """PyTorch's optimizer options except the learning rate."""
    if config.name == "sgd":
        rules: dict[str, Any] = {"momentum": config.momentum, "nesterov": bool(config.momentum and config.nesterov)}
    else:
        rules = {"betas": (config.b1, config.b2), "eps": config.eps}
    return {"weight_decay": config.weight_decay, **rules}


def _group_problems(config: OptimConfig, group: Mapping[str, Any]) -> list[str]:
    """Contradictions between a PyTorch parameter group and `config`; the learning rate is the schedule's business."""
    wanted = _group_options(config)
    if "decoupled_weight_decay" in group:
        wanted["decoupled_weight_decay"] = config.name == "adamw"
    problems = []
    for name, value in wanted.items():
        found = tuple(group[name]) if isinstance(group.get(name), list) else group.get(name)
        if found != value:
            problems.append(f"{name} is {found} in the file, {value} in the configuration")
    return problems + [
        f"{name} is {group[name]}; it has no counterpart here" for name in UNSUPPORTED if group.get(name)
    ]


def _problem(given: Any, row: Entry, dtype: DTypeLike) -> str | None:
    if given is None:
        return f"is missing; its shape should be {row.shape}"
    array = np.asarray(given)
    if array.shape != row.shape:
        return f"has the shape {array.shape}; it should be {row.shape}"
    if array.dtype != dtype:
        return f"is {array.dtype}; it should be {np.dtype(dtype)}"
    return None if bool(np.isfinite(array).all()) else "contains NaN or infinity"


def _blank_state(config: Config, outputs: int) -> TrainState:
    """Zeros with the names, shapes and dtypes of the training state."""
    shapes = jax.eval_shape(lambda: create_state(config, build_model(config, outputs))[1])
    blank: TrainState = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    return blank


def _outputs(arrays: Mapping[str, Any], src: Path) -> int:
    try:
        return int(arrays["params"]["final_conv"]["bias"].shape[0])
    except (KeyError, TypeError):
        raise UserError(f"{src} contains no parameters of a network of this project") from None


def _trained(rows: Sequence[Entry], config: Config) -> list[Entry]:
    """The rows of parameters that are not frozen: PyTorch keeps nothing for parameters without a gradient."""
    return [row for row in rows if not is_frozen(row.public, config.train.freeze)]


def _parameter_names(arrays: Mapping[str, Any]) -> list[str]:
    """Names in the order of `model.parameters()`: that of the state dict without its buffers."""
    return [name for name in arrays if name.endswith((".weight", ".bias"))]


def _optimizer(
    config: Config, names: Sequence[str], buffers: Mapping[str, Mapping[str, Any]], step: int, dst: Path
) -> dict[str, Any]:
    """State dict of the optimizer; PyTorch itself supplies the fields of a parameter group in the installed version."""
    torch = import_torch(dst)
    kinds: dict[str, Any] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    parameters = [torch.nn.Parameter(torch.zeros(())) for _ in names]
    rate = float(make_schedule(config.optim, config.train.steps)(step))
    state: dict[str, Any] = kinds[config.optim.name](parameters, lr=rate, **_group_options(config.optim)).state_dict()
    # The dead block never has a gradient, so PyTorch keeps nothing for it either.
    state["state"] = {i: dict(buffers[name]) for i, name in enumerate(names) if buffers.get(name)}
    return state


def _configuration(content: Mapping[str, Any], src: Path, name: str | None) -> tuple[Config, str]:
    """The configuration `name`, or else the file's own, and the fingerprint of the dataset if the file has one."""
    try:
        header = json.loads(content.get(HEADER, "{}"))
    except (TypeError, json.JSONDecodeError):
        header = None
    if not isinstance(header, dict):
        raise UserError(f"{src}: its entry {HEADER!r} is not a JSON object")
    if name is None and "config" not in header:
        raise UserError(f"{src} contains no configuration: give --config NAME or a TOML file")
    config = configuration.from_dict(header["config"], str(src)) if name is None else configuration.load(name)
    return config, header.get("data", "")


def _read_training(content: Mapping[str, Any], src: Path) -> TorchTraining:
    """The parts of a `.pth`, checked against each other."""
    given = [content.get(key) for key in OPTIMIZER_KEYS]
    given = [item[0] if isinstance(item, list) and len(item) == 1 else item for item in given]  # Lightning has a list
    optimizer = next((item for item in given if isinstance(item, Mapping)), None)
    if optimizer is None:
        raise UserError(f"{src} contains no optimizer: without --config, only its weights are converted")
    model, notes = find_state_dict({key: item for key, item in content.items() if key not in OPTIMIZER_KEYS}, str(src))
    if not model:
        raise UserError(f"{src} contains no state dict of a network")

    # The arrays are numbered like the parameters of the one group.
    groups = optimizer.get("param_groups")
    if not isinstance(groups, list) or len(groups) != 1 or not isinstance(groups[0], Mapping) or "lr" not in groups[0]:
        raise UserError(f"{src}: the optimizer must have one parameter group with a learning rate")
    names, numbers = _parameter_names(model), groups[0].get("params", ())
    if len(numbers) != len(names):
        raise UserError(
            f"{src}: the optimizer was made for {len(numbers)} parameters, the model has {len(names)}; make it from "
            "all of model.parameters()"
        )
    name_of = dict(zip(map(int, numbers), names, strict=True))
    buffers = {
        name_of[int(number)]: {key: value for key, value in mine.items() if value is not None}
        for number, mine in optimizer.get("state", {}).items()
    }

    counts = (mine["step"] for mine in buffers.values() if "step" in mine)
    step = next((content[key] for key in STEP_KEYS if key in content), next(counts, None))
    if step is None:
        raise UserError(f"{src} does not state the number of updates; store it under 'step'")
    weights = from_public(model, str(src))
    weights = weights._replace(notes=(*notes, *weights.notes))
    return TorchTraining(weights, buffers, groups[0], int(np.asarray(step)), content.get("ema"))


def _check_model(config: Config, found: Mapping[str, Any], src: Path) -> None:
    if found["name"] != config.model.name:
        found = {"name": found["name"]}
    wanted = {name: getattr(config.model, name) for name in found}
    if "outputs" in wanted and config.model.outputs is None:
        wanted["outputs"] = found["outputs"]
    if "up" in wanted:
        wanted["up"] = config.model.up.removesuffix("_corners")  # nothing in the arrays tells them apart
    problems = [
        f"model.{name} is {value} in the configuration, {found[name]} in the file"
        for name, value in wanted.items()
        if found[name] != value
    ]
    if problems:
        raise DataError(f"{src} contains a different network than the configuration's", problems)


def _train_state(config: Config, training: TorchTraining, src: Path) -> TrainState:
    params, stats = training.weights.params, training.weights.stats
    blank = _blank_state(config, training.weights.options["outputs"])
    found, wanted = ({leaf.dtype for leaf in jax.tree.leaves(tree)} for tree in (params, blank.params))
    if found != wanted:
        raise UserError(
            f"{src} is in {found.pop()}, but --train.precision {config.train.precision} keeps parameters in "
            f"{wanted.pop()}"
        )
    ema, ema_stats = (params, stats) if config.optim.ema else (None, None)
    if config.optim.ema and training.ema is not None:
        arrays = to_public(params, stats, dead_block=False)
        averages = from_public({**arrays, **training.ema}, f"{src}, ema")
        ema, ema_stats = averages.params, averages.stats
    opt_state = blank.opt_state
    if training.step or training.buffers:  # PyTorch keeps nothing before the first update
        rows = _trained(parameter_table(config.model, training.weights.options["outputs"]), config)
        opt_state = from_torch(config.optim, rows, blank.opt_state, training.buffers, training.step)
    step: Any = np.asarray(training.step, np.int32)
    return dataclasses.replace(
        blank, params=params, stats=stats, opt_state=opt_state, ema=ema, ema_stats=ema_stats, step=step
    )
