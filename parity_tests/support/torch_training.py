"""Training in PyTorch: optimizer updates, scheduler learning rates, training steps of the twin."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from parity_tests.support import torch_side
from parity_tests.support.case import Arrays, Batch, Trajectory, follow
from parity_tests.support.imitate import Change, imitated
from parity_tests.support.torch_side import TorchHalf, nchw, nhwc, numpy, place, state_arrays
from pdrunet_torch_ref import training, training_state
from pdrunet_torch_ref.training_state import TrainingState


def updates(
    make_optimizer: Callable[[Any], torch.optim.Optimizer],
    parameters: Arrays,
    gradients: Sequence[Arrays],
    clip: float = 0.0,
    changes: Sequence[Change] = (),
) -> list[Arrays]:
    """Return the parameters after each update with the given gradients."""
    tensors = {name: torch.nn.Parameter(place(array)) for name, array in parameters.items()}
    optimizer = make_optimizer(_Holder(tensors))
    for change in changes:
        change.apply_to(optimizer)
    result = []
    for step in gradients:
        for name, tensor in tensors.items():
            tensor.grad = place(step[name])
        if clip:
            torch.nn.utils.clip_grad_norm_(tensors.values(), clip)
        optimizer.step()
        result.append({name: numpy(tensor) for name, tensor in tensors.items()})
    return result


def settings(half: TorchHalf) -> dict[str, Any]:
    """Settings of the original's optimizer."""
    assert half.optimizer is not None
    group = half.optimizer(half.build()).param_groups[0]
    return {name: value for name, value in group.items() if name != "params"}


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


@dataclasses.dataclass
class TorchTrainer:
    """Training of a PyTorch original; see `case.Trainer`."""

    half: TorchHalf
    batches: Mapping[int, Batch]
    """By number."""
    changes: Sequence[Change] = ()
    """Mistakes that PyTorch imitates."""

    def step(self, state: TrainingState, number: int) -> tuple[TrainingState, float]:
        """Update with `pdrunet_torch_ref`'s training step."""
        batch = self.batches[number]
        masks = None if batch.masks is None else [nchw(mask) for mask in batch.masks]
        target = torch_side.place(batch.target) if isinstance(batch.target, np.ndarray) else batch.target
        with imitated(state.model, self.changes):
            loss = training.train_step(
                state.model,
                state.optimizer,
                lambda output, *_: self.half.loss(output, target),
                nchw(batch.images),
                torch.zeros(()),
                masks=masks,
            )
        state.step += 1
        return state, float(loss)

    def finish(self, state: TrainingState, number: int) -> tuple[Arrays, np.ndarray]:
        """Return all arrays, and the output in evaluation mode."""
        with torch.no_grad(), imitated(state.model, self.changes):
            output = nhwc(state.model.eval()(nchw(self.batches[number].images)))
        arrays = {name: array for name, array in state_arrays(state.model).items() if not self.half.lacking(name)}
        return arrays, np.asarray(output)

    def run(self, state: TrainingState) -> Trajectory:
        """Train with all batches."""
        for change in self.changes:
            change.apply_to(state.optimizer)
        return follow(self, state, list(self.batches))[1]


def start(half: TorchHalf, arrays: Arrays, header: Mapping[str, Any] | None = None) -> TrainingState:
    """Build the original with `arrays` and its optimizer."""
    assert half.optimizer is not None
    model = half.holding(arrays)
    return TrainingState(model, half.optimizer(model), header=header or {})


def train(half: TorchHalf, arrays: Arrays, batches: Mapping[int, Batch], changes: Sequence[Change] = ()) -> Trajectory:
    """Train the original from `arrays`."""
    return TorchTrainer(half, batches, changes).run(start(half, arrays))


def train_and_save(
    half: TorchHalf, arrays: Arrays, batches: Mapping[int, Batch], path: Path, header: Mapping[str, Any]
) -> Trajectory:
    """Train the original, then write the whole training state to `path`."""
    state = start(half, arrays, header)
    result = TorchTrainer(half, batches).run(state)
    training_state.save(path, state)
    return result


def frozen(build: Callable[[], torch.nn.Module], patterns: tuple[str, ...], trains: bool) -> torch.nn.Module:
    """Build a network with frozen layers; if it `trains`, their normalisations stay in training mode."""
    network = build()
    training.freeze(network, patterns)
    for module in network.modules():
        if trains and isinstance(module, torch.nn.BatchNorm2d):
            module.eval = lambda module=module: module  # type: ignore[method-assign,misc]
    return network


def load_and_train(half: TorchHalf, path: Path, batches: Mapping[int, Batch]) -> Trajectory:
    """Continue from the training state of this project's networks in the file `path`."""
    state = training_state.load(path)
    state.model.to(torch_side.device())
    # Loading the optimizer's state again moves it to the device of its parameters.
    state.optimizer.load_state_dict(state.optimizer.state_dict())
    return TorchTrainer(half, batches).run(state)


Moments = dict[str, dict[str, np.ndarray]]
"""Optimizer arrays by the name of their parameter."""


def train_from(
    half: TorchHalf, arrays: Arrays, moments: Moments, batches: Mapping[int, Batch]
) -> tuple[Trajectory, Moments]:
    """Train the original from `arrays` and optimizer arrays, if any; return the optimizer arrays too."""
    state = start(half, arrays)
    names = [name for name, _ in state.model.named_parameters()]
    content = state.optimizer.state_dict()
    content["state"] = {
        index: {key: torch.from_numpy(np.array(array)) for key, array in moments[name].items()}
        for index, name in enumerate(names)
        if name in moments
    }
    state.optimizer.load_state_dict(content)
    result = TorchTrainer(half, batches).run(state)
    after = state.optimizer.state_dict()["state"]
    return result, {
        names[index]: {key: numpy(value) for key, value in mine.items() if value is not None}
        for index, mine in after.items()
    }


class _Holder:
    """Parameters in the form that an optimizer takes from a network."""

    def __init__(self, tensors: Mapping[str, torch.nn.Parameter]) -> None:
        self._tensors = tensors

    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self._tensors.values())
