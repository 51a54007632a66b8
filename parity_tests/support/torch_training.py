"""Training in PyTorch: optimizer updates, scheduler learning rates, training steps of the twin."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from parity_tests.support import torch_side
from parity_tests.support.case import Arrays, Case, Step, Trajectory
from parity_tests.support.torch_side import nchw, nhwc, numpy, place, state_arrays
from pdrunet_torch_ref import training, training_state

Settings = Mapping[str, Any]


def updates(settings: Settings, parameters: Arrays, gradients: Sequence[Arrays], clip: float = 0.0) -> list[Arrays]:
    """Return the parameters after each update with the given gradients."""
    tensors = {name: torch.nn.Parameter(place(array)) for name, array in parameters.items()}
    optimizer = training_state.make_optimizer(_Holder(tensors), settings)  # type: ignore[arg-type]
    result = []
    for step in gradients:
        for name, tensor in tensors.items():
            tensor.grad = place(step[name])
        if clip:
            torch.nn.utils.clip_grad_norm_(tensors.values(), clip)
        optimizer.step()
        result.append({name: numpy(tensor) for name, tensor in tensors.items()})
    return result


def learning_rates(schedule: str, steps: int, warmup: int, final: float, power: float) -> list[float]:
    """Return the rates of PyTorch's own schedulers for a peak of 1, before each of `steps` updates."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    lr = torch.optim.lr_scheduler
    rest = steps - warmup
    if schedule == "onecycle":
        scheduler: Any = lr.OneCycleLR(optimizer, 1.0, total_steps=steps, cycle_momentum=False)
    else:
        after: Any = {
            "constant": lambda: lr.ConstantLR(optimizer, 1.0, 1),
            "cosine": lambda: lr.CosineAnnealingLR(optimizer, rest, eta_min=final),
            "polynomial": lambda: lr.PolynomialLR(optimizer, rest, power),
        }[schedule]()
        rise = lr.LinearLR(optimizer, 1 / warmup, 1.0, warmup - 1) if warmup else None
        scheduler = lr.SequentialLR(optimizer, [rise, after], [warmup]) if rise else after
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def train(case: Case, arrays: Arrays, settings: Settings, loss: str, steps: Sequence[Step]) -> Trajectory:
    """Train the twin from `arrays` with the optimizer of `settings`."""
    twin = torch_side.twin_of(case, arrays)
    state = training_state.TrainingState(twin, training_state.make_optimizer(twin, settings))
    return _run(state, loss, steps)


def train_and_save(
    case: Case, arrays: Arrays, config: Mapping[str, Any], loss: str, steps: Sequence[Step], path: Path
) -> Trajectory:
    """Train the twin, then write the whole training state to `path`."""
    twin = torch_side.twin_of(case, arrays)
    optimizer = training_state.make_optimizer(twin, config["optim"])
    state = training_state.TrainingState(twin, optimizer, header={"config": config})
    result = _run(state, loss, steps)
    training_state.save(path, state)
    return result


def load_and_train(path: Path, loss: str, steps: Sequence[Step]) -> Trajectory:
    """Continue from the training state in the file `path`."""
    state = training_state.load(path)
    state.model.to(torch_side.device())
    # Loading the optimizer's state again moves it to the device of its parameters.
    state.optimizer.load_state_dict(state.optimizer.state_dict())
    return _run(state, loss, steps)


def _run(state: training_state.TrainingState, loss: str, steps: Sequence[Step]) -> Trajectory:
    objective = training.make_loss(loss, state.model.final_conv.out_channels)
    losses = []
    for step in steps:
        images, target, valid = nchw(step.images), place(step.target), place(step.valid)
        masks = [nchw(mask) for mask in step.masks]
        losses.append(float(training.train_step(state.model, state.optimizer, objective, images, target, valid, masks)))
        state.step += 1
    with torch.no_grad():
        logits = nhwc(state.model.eval()(nchw(steps[-1].images)))
    arrays = {name: array for name, array in state_arrays(state.model).items() if not name.startswith("e5.")}
    return Trajectory(losses, arrays, np.asarray(logits))


class _Holder:
    """Parameters in the form that an optimizer takes from a network."""

    def __init__(self, tensors: Mapping[str, torch.nn.Parameter]) -> None:
        self._tensors = tensors

    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self._tensors.values())
