"""Training state that moves between PyTorch and JAX: model, optimizer and step in one file.

`python -m pdrunet_jax.convert RUN state.pth --to-torch-training-state` writes the file, `load` builds the twin and its
optimizer from it, `save` writes it back, and `python -m pdrunet_jax.convert state.pth RUN` makes a run folder in which
training resumes.
"""

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pdrunet_torch_ref import TWINS
from pdrunet_torch_ref.training import freeze

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}

HEADER = "pdrunet"


@dataclass
class TrainingState:
    """State from which training resumes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    """Updates done."""
    ema: dict[str, torch.Tensor] = field(default_factory=dict)
    """Averaged parameters by name, if the run keeps them."""
    header: Mapping[str, Any] = field(default_factory=dict)
    """The run's configuration (`config`) and the fingerprint of its dataset (`data`), unchanged."""


def make_twin(options: Mapping[str, Any]) -> nn.Module:
    """The twin of a network with the options of the `[model]` section of a configuration."""
    twin = TWINS[options.get("name", "pdrunet")]
    taken = inspect.signature(twin).parameters
    return twin(**{name: value for name, value in options.items() if name in taken})


def make_optimizer(model: nn.Module, settings: Mapping[str, Any]) -> torch.optim.Optimizer:
    """Optimizer over `model.parameters()` as described by the `[optim]` section of a configuration.

    The learning rate is the constant `learning_rate`; schedules, clipping and averaging are up to the caller.
    """
    name = settings.get("name", "adam")
    options: dict[str, Any] = {
        "lr": settings.get("learning_rate", 1e-3),
        "weight_decay": settings.get("weight_decay", 0.0),
    }
    if name == "sgd":
        momentum = settings.get("momentum", 0.9)
        options |= {"momentum": momentum, "nesterov": bool(momentum) and settings.get("nesterov", True)}
    else:
        options |= {
            "betas": (settings.get("b1", 0.9), settings.get("b2", 0.999)),
            "eps": settings.get("eps", 1e-8),
        }
    return OPTIMIZERS[name](model.parameters(), **options)


def load(path: str | Path) -> TrainingState:
    """Load the twin and its optimizer; raises `ValueError` for a file without a configuration."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    if HEADER not in content:
        raise ValueError(f"{path} does not contain a training state converted from a run folder")
    header = json.loads(content[HEADER])
    options = header["config"]["model"]
    kernel = content["model"]["final_conv.weight"]
    model = make_twin({**options, "outputs": kernel.shape[0]}).to(kernel.dtype)
    model.load_state_dict(content["model"], strict=True)
    freeze(model, header["config"].get("train", {}).get("freeze", ()))
    optimizer = make_optimizer(model, header["config"]["optim"])
    optimizer.load_state_dict(content["optimizer"])
    return TrainingState(model, optimizer, content["step"], content.get("ema", {}), header)


def save(path: str | Path, state: TrainingState) -> None:
    """Write `state` to `path`."""
    content: dict[str, Any] = {
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "step": state.step,
    }
    if state.header:
        content[HEADER] = json.dumps(dict(state.header))
    if state.ema:
        content["ema"] = state.ema
    torch.save(content, path)
