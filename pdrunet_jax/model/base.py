"""What every network has: options, the wiring's building blocks, dropout, devices and the last layer."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from pydantic import TypeAdapter

from pdrunet_jax.config import ModelConfig
from pdrunet_jax.model import resampling
from pdrunet_jax.model.execution import Execution, run_block
from pdrunet_jax.model.fast.phases import Activation
from pdrunet_jax.model.layers import Conv, State, dropout, final_layer, keep_masks, split_state
from pdrunet_jax.model.pixels import foreground_classes
from pdrunet_jax.model.sharding import spread
from pdrunet_jax.model.sides import Mirror
from pdrunet_jax.runtime.errors import UserError


class Addable(Protocol):
    """Anything that can be added to its own kind: an activation, a node of an exported graph."""

    def __add__(self, other: Self) -> Self: ...


T = TypeVar("T", bound=Addable)


class Layers(Protocol[T]):
    """The parts of a network, applied to activations or to nodes of an exported graph. `+` is a skip connection."""

    def block(self, name: str, x: T) -> T:
        """Apply the convolutions of a block, and the dropout after it."""
        ...

    def down(self, name: str, x: T) -> T:
        """Halve the resolution."""
        ...

    def up(self, name: str, x: T, like: T) -> T:
        """Double the resolution to that of `like`."""
        ...

    def join(self, x: T, y: T) -> T:
        """Concatenate channels, those of `x` first."""
        ...


class Part(NamedTuple):
    """A part of a network with weights, as an attribute of this name."""

    kind: Literal["block", "down", "up"]
    name: str
    inputs: int
    outputs: int
    size: int = 3
    """Side of the kernels."""
    normalised: bool = True


class Network(nnx.Module):
    """A network that gives every pixel of an image its logits.

    A subclass lists its parts, makes them, and says how they are wired. The last layer is a 1x1 convolution.

    Args:
        config: the network's options. `outputs` left out is 1.
        rngs: its `params` stream draws the initial weights.
        dtype: arithmetic of the convolutions; `param_dtype` when None.
        param_dtype: dtype of parameters, statistics and logits.
        size: (height, width) that the weights were trained at, where known. The network takes any other size too.
        fit: how images were brought to that size, as `data.fit`.
        spacing: mm per pixel that images were resampled to, as `data.spacing`.
        multilabel: classes overlap: each has an output of its own, and none is for the background.

    Raises:
        ValueError: an option that does not exist, or is out of its bounds.
        UserError: options that do not go together.
    """

    block_layers: ClassVar[tuple[tuple[str, str], ...]] = (("first", "bnorm1"), ("second", "bnorm2"))
    """Names of the convolutions of a block, each with its normalisation's."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        size: tuple[int, int] | None = None,
        fit: Literal["stretch", "pad"] = "stretch",
        spacing: float | None = None,
        multilabel: bool = False,
    ) -> None:
        self.config = config = _validator().validate_python(dataclasses.asdict(config))
        if problems := config.conflicts():
            raise UserError("; ".join(problems))
        self.in_channels = config.in_channels
        self.outputs = config.outputs or 1
        self.dtype = jnp.dtype(param_dtype if dtype is None else dtype)
        self.size = size
        self.mirror = Mirror()
        self.fit: Literal["stretch", "pad"] = fit
        self.spacing = spacing
        self.multilabel = multilabel
        for part in self.parts(config):
            setattr(self, part.name, self.make(part, param_dtype, rngs))
        self.final_conv = Conv(config.filters, self.outputs, size=1, init=config.init, dtype=param_dtype, rngs=rngs)

    @classmethod
    def parts(cls, config: ModelConfig) -> list[Part]:
        """The parts with weights, in the order of the forward pass, without the last layer."""
        raise NotImplementedError

    def make(self, part: Part, dtype: DTypeLike, rngs: nnx.Rngs) -> object:
        """Make a part of `parts`, with initial weights."""
        raise NotImplementedError

    @property
    def members(self) -> "tuple[Network, ...]":
        """The networks whose probabilities are averaged: this one alone, unless it is an ensemble."""
        return (self,)

    @property
    def multiple(self) -> int:
        """Side of the square that becomes one pixel at the lowest resolution, a power of 2."""
        return 1

    @property
    def radius(self) -> int:
        """Radius of the receptive field in pixels, or a little more."""
        raise NotImplementedError

    @property
    def tileable(self) -> bool:
        """Whether the logits of a pixel do not depend on the size of the image, so that tiles are exact."""
        return self.config.up != "bilinear_corners"

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise `UserError` if images of `size` (height, width) are too small."""
        if min(size) < self.multiple:
            shown, depth = " x ".join(map(str, size)), self.config.depth
            raise UserError(
                f"images of {shown} pixels are too small for model.depth = {depth}: at least {self.multiple} a side"
            )

    def dropout_shapes(self, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Shapes of the dropout masks for images of `shape`, by the block that they follow."""
        raise NotImplementedError

    def wire(self, layers: Layers[T], x: T) -> T:
        """Apply all parts but the last layer to the first activation."""
        raise NotImplementedError

    @property
    def foreground_classes(self) -> int:
        """Number of classes without background."""
        return foreground_classes(self.outputs, multilabel=self.multilabel)

    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool = False,
        dropout_key: jax.Array | None = None,
        dropout_masks: Sequence[jax.Array] | None = None,
        execution: Execution | None = None,
    ) -> jax.Array:
        """Compute the logits of `images`.

        Args:
            images: (N, H, W, in_channels), in [0, 1]. Any size; multiples of 32 are fastest.
            train: normalise with the batch's statistics, update the running ones, and drop out.
            dropout_key: key of the random dropout masks; needed in training unless the rate is 0.
            dropout_masks: boolean arrays of `dropout_shapes`, true where values are kept, instead of a key.
            execution: how and where the pass is computed; by default as `config.conv` says, on one device.

        Returns:
            (N, H, W, outputs), in the parameters' dtype.

        Raises:
            ValueError: a shape that does not fit, training with dropout but without key or masks, or a tap on a mesh.
            UserError: the images are too small, or cannot be split evenly over the mesh.
        """
        if images.ndim != 4 or images.shape[-1] != self.config.in_channels:
            wanted = f"(N, H, W, {self.config.in_channels})"
            raise ValueError(f"images have the shape {images.shape}; it should be {wanted}")
        self.check_size((images.shape[1], images.shape[2]))
        shapes = self.dropout_shapes(images.shape) if train and self.config.dropout else {}
        if not shapes:
            dropout_masks = ()
        elif dropout_masks is None:
            if dropout_key is None:
                raise ValueError("training with dropout needs dropout_key or dropout_masks")
            dropout_masks = keep_masks(dropout_key, self.config.dropout, list(shapes.values()))
        masks = dict(zip(shapes, dropout_masks, strict=True))

        execution = execution or Execution.of(self.config.conv)
        if execution.mesh is None:
            return self._logits(images, masks, train=train, execution=execution)
        if execution.tap is not None:
            raise ValueError("a tap cannot see the activations of a network that is spread over a mesh")
        graphdef, params, stats = split_state(self)

        def part(state: tuple[State, State], data: Any) -> tuple[jax.Array, State]:
            network = nnx.merge(graphdef, *state, copy=True)
            return network._logits(*data, train=train, execution=execution), nnx.state(network, nnx.BatchStat)

        logits, stats = spread(execution.mesh, part, (params, stats), (images, masks))
        nnx.update(self, stats)
        return logits

    def _logits(
        self, images: jax.Array, masks: Mapping[str, jax.Array], *, train: bool, execution: Execution
    ) -> jax.Array:
        """Logits of the images, or of the part of them that one device of a mesh holds."""
        execution = execution.for_dtypes(self.dtype, self.final_conv.bias.dtype)
        layers = _ActivationLayers(self, masks, train, execution)
        x = self.wire(layers, execution.first_activation(images.astype(self.dtype)))

        logits = final_layer(x, self.final_conv)
        if execution.tap is not None:
            execution.tap("final_conv", logits)
        return logits


@dataclasses.dataclass(frozen=True)
class _ActivationLayers:
    """Apply a network's parts to activations."""

    network: Network
    masks: Mapping[str, jax.Array]
    train: bool
    execution: Execution

    def block(self, name: str, x: Activation) -> Activation:
        out = run_block(getattr(self.network, name), x, train=self.train, execution=self.execution)
        if name in self.masks:
            keep = Activation.of(self.masks[name], out.limit).in_phases(out.phases).values
            out = out.with_values(dropout(out.values, self.network.config.dropout, keep))
        return out

    def down(self, name: str, x: Activation) -> Activation:
        return resampling.down(getattr(self.network, name, None), x, name, self.execution)

    def up(self, name: str, x: Activation, like: Activation) -> Activation:
        part, size = getattr(self.network, name), like.image().shape[1:3]
        return part(x, size, train=self.train, execution=self.execution)

    def join(self, x: Activation, y: Activation) -> Activation:
        return x.with_values(jnp.concatenate([x.values, y.in_phases(x.phases).values], x.channel_axis))


@cache
def _validator() -> TypeAdapter[ModelConfig]:
    return TypeAdapter(ModelConfig)
