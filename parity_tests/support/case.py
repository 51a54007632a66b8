"""Networks with their inputs, and the results of a pass or a training. NumPy only, so that each framework can run
without the other."""

import dataclasses
from collections.abc import Container, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

Arrays = dict[str, np.ndarray]
S = TypeVar("S")


class Compared(Protocol):
    """What a comparison has to know of the two networks."""

    @property
    def dtype(self) -> str:
        """float64 or float32."""
        ...

    @property
    def partial(self) -> bool:
        """Whether the Flax module lacks some of the named activations, by design."""
        ...

    def silent(self, name: str, names: Container[str]) -> bool:
        """Whether `name` is a bias without effect, because a normalisation removes it."""
        ...


@dataclasses.dataclass(frozen=True)
class Case:
    """A network and its input."""

    network: str = "pdrunet"
    shortcut: str = "input"
    norm: str = "batch"
    in_channels: int = 1
    outputs: int = 1
    filters: int = 4
    dropout: float = 0.3
    depth: int = 2
    down: str = "max"
    up: str = "transposed"
    path: str = "plain"
    dtype: str = "float64"
    shape: tuple[int, int, int] = (1, 32, 32)
    """Batch, height, width."""

    def __str__(self) -> str:
        batch, height, width = self.shape
        channels = f"{self.in_channels}-{self.filters}-{self.outputs}"
        kind = self.shortcut if self.network == "pdrunet" else f"{self.network} {self.depth} {self.down} {self.up}"
        return f"{kind} {self.norm} {channels} {batch}x{height}x{width} {self.path} {self.dtype}"

    @property
    def options(self) -> dict[str, Any]:
        """Options of the twin."""
        own = {
            "pdrunet": ("shortcut", "dropout"),
            "unet": ("depth", "down", "up", "dropout"),
            "fusionnet": ("depth", "down", "up"),
        }[self.network]
        return {name: getattr(self, name) for name in ("norm", "in_channels", "outputs", "filters", *own)}

    @property
    def mask_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the dropout masks, (N, H, W, channels)."""
        if self.network == "fusionnet":
            return []
        if self.network == "pdrunet":
            return [(*self.shape, self.filters)] * 2
        shapes, (batch, height, width) = [], self.shape
        for level in range(self.depth + 1):
            shapes.append((batch, height, width, self.filters * 2**level))
            height, width = (side // 2 if self.down == "max" else -(-side // 2) for side in (height, width))
        return shapes[-2:]

    @property
    def partial(self) -> bool:
        """The fused and native paths have no values between convolution and normalisation."""
        return self.path in ("fused", "native")

    def silent(self, name: str, names: Container[str]) -> bool:
        """Whether `name` is the bias of a convolution that a normalisation follows, where it has no effect."""
        return before_norm(name, names)

    def replace(self, **changes: Any) -> "Case":
        return dataclasses.replace(self, **changes)


def before_norm(name: str, names: Container[str]) -> bool:
    """Whether `name` is the bias of a convolution that a normalisation follows, by the names of our networks."""
    part, _, layer = name.removesuffix(".bias").rpartition(".")
    norm = {"first": "bnorm1", "second": "bnorm2"}.get(layer, layer.replace("conv", "bnorm"))
    return name.endswith(".bias") and norm.startswith("bnorm") and layer != norm and f"{part}.{norm}.weight" in names


@dataclasses.dataclass
class Pass:
    """Results of one pass: arrays in NHWC order by public name."""

    activations: Arrays
    logits: np.ndarray
    buffers: Arrays
    loss: float | None = None
    gradients: Arrays | None = None


@dataclasses.dataclass
class Trajectory:
    """Results of training steps."""

    losses: list[float]
    """Loss before each update."""
    arrays: Arrays
    """Parameters and buffers after the last update, by public name, in the public layout."""
    logits: np.ndarray
    """Logits of the last images in evaluation mode, NHWC."""


class Trainer(Protocol[S]):
    """A training in one framework: a network, its optimizer, its loss and its batches."""

    def step(self, state: S, number: int) -> tuple[S, float]:
        """Update once with the batch of this number; returns the loss before the update."""
        ...

    def finish(self, state: S, number: int) -> tuple[Arrays, np.ndarray]:
        """All arrays by public name, and the output for the batch of this number in evaluation mode."""
        ...


def follow(trainer: Trainer[S], state: S, numbers: Sequence[int]) -> tuple[S, Trajectory]:
    """Train with the batches of these numbers."""
    losses = []
    for number in numbers:
        state, loss = trainer.step(state, number)
        losses.append(float(loss))
    return state, Trajectory(losses, *trainer.finish(state, numbers[-1]))


@dataclasses.dataclass(frozen=True)
class Batch:
    """Input of one pass or one training step."""

    images: np.ndarray
    """(N, H, W, C)."""
    target: Any
    """What the loss takes beside the network's output: an array, or an `Objective`."""
    masks: list[np.ndarray] | None = None
    """Keep masks of the dropouts, (N, H, W, channels), bool; None for a network without dropout."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss with all its inputs except the logits."""

    name: str
    outputs: int
    target: np.ndarray
    """(N, H, W): float for one output, int32 class indices otherwise."""
    valid: np.ndarray
    """Pixels that count, (N, H, W), bool."""
    class_weights: tuple[float, ...] = ()


def make_images(case: Case, seed: int = 1) -> np.ndarray:
    """Random images (N, H, W, C) in [0, 1]."""
    return np.random.default_rng(seed).random((*case.shape, case.in_channels)).astype(case.dtype)


def make_masks(case: Case, seed: int = 2) -> list[np.ndarray]:
    """Keep masks of the dropouts, (N, H, W, channels)."""
    rng = np.random.default_rng(seed)
    return [rng.random(shape) >= case.dropout for shape in case.mask_shapes]


def make_objective(case: Case, seed: int = 3) -> Objective:
    """The default loss with a random target; 90 % of the pixels are valid."""
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, max(case.outputs, 2), case.shape)
    valid = rng.random(case.shape) < 0.9
    target = classes.astype(case.dtype if case.outputs == 1 else np.int32)
    return Objective("bce_dice" if case.outputs == 1 else "ce_dice", case.outputs, target, valid)
