"""What an engine is, and what prediction needs to know of a network besides its logits. Loads no JAX."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np

from pdrunet_jax.model.pixels import foreground_classes
from pdrunet_jax.model.sides import Mirror
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.extras import how_to_install

if TYPE_CHECKING:
    from pdrunet_jax.model.base import Network

EngineName = Literal["jax", "onnxruntime", "openvino"]
EngineChoice = Literal["jax", "onnxruntime", "openvino", "auto"]
Precision = Literal["float32", "bfloat16"]

DEFAULT_ENGINE: EngineName = "jax"
DEFAULT_PRECISION: Precision = "float32"

GRAPH_ENGINES: tuple[EngineName, ...] = ("openvino", "onnxruntime")
"""Engines that take an ONNX graph, the faster one first (docs/performance.md)."""

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Facts:
    """What prediction needs to know of a network; attributes as of `Network`."""

    in_channels: int
    outputs: int
    multilabel: bool
    size: tuple[int, int] | None
    fit: Literal["stretch", "pad"]
    spacing: float | None
    mirror: Mirror
    radius: int
    multiple: int
    tileable: bool

    @classmethod
    def of(cls, network: "Network") -> "Facts":
        """The facts of a network."""
        return cls(**{name: getattr(network, name) for name in cls.__dataclass_fields__})

    @property
    def foreground_classes(self) -> int:
        """Number of classes without background."""
        return foreground_classes(self.outputs, multilabel=self.multilabel)


class Engine:
    """A network ready to compute logits.

    Attributes:
        name: what computes.
        precision: arithmetic of the convolutions.
        facts: what is known of the network.
    """

    def __init__(self, name: EngineName, precision: Precision, facts: Facts) -> None:
        self.name, self.precision, self.facts = name, precision, facts

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Logits (N, H, W, K), float32, of images (N, H, W, C), uint8; averaged over the members of an ensemble.

        Raises `UserError` if the images are too small for the network.
        """
        raise NotImplementedError

    def spread(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, Callable[[], R]]]:
        """Yield each of `items`, in order, with a function that returns (or raises) the result of `function(item)`."""
        yield from ((item, partial(function, item)) for item in items)


def facts_of(model: "Network | Engine") -> Facts:
    """The facts of a network or of an engine's."""
    return model.facts if isinstance(model, Engine) else Facts.of(model)


def is_installed(name: str) -> bool:
    """Whether the packages of an engine are installed."""
    return name == "jax" or all(find_spec(package) is not None for package in (name, "onnx"))


def check_engine(name: EngineChoice, precision: Precision) -> None:
    """Raise `UserError` if a package of the engine is missing, or it computes in float32 alone."""
    if not (name == "auto" or is_installed(name)):
        raise UserError(f"--engine {name} needs the packages {name} and onnx: {how_to_install(name)}")
    if name == "onnxruntime" and precision != "float32":
        raise UserError(f"--precision {precision}: onnxruntime computes in float32 only; use another --engine")
