"""PDR-UNet, the pure dilated residual U-Net of Shen et al., Inverse Problems and Imaging, doi 10.3934/ipi.2020057.

There is no down- or up-sampling: every layer works at the image's own resolution with the same number of filters.
Dilations double on the way in and halve on the way out, and the long skips are additions.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Literal, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from pydantic import TypeAdapter

from pdrunet_jax.config import ModelConfig
from pdrunet_jax.model.execution import Execution, run_block
from pdrunet_jax.model.fast.phases import Activation
from pdrunet_jax.model.layers import BatchNorm, Conv, State, conv_norm_relu, dropout, keep_masks, split_state
from pdrunet_jax.model.sharding import spread
from pdrunet_jax.model.sides import Mirror


class Addable(Protocol):
    """Anything that can be added to its own kind: an activation, a node of an exported graph."""

    def __add__(self, other: Self) -> Self: ...


T = TypeVar("T", bound=Addable)


def wire(block: Callable[[str, T], T], x: T) -> T:
    """The wiring of Figure 1. `block(name, x)` applies a block; every `+` is a long skip."""
    x0 = block("std_block", x)
    x1 = block("e1", x0)
    x2 = block("e2", x1 + x0)
    x3 = block("e3", x2)
    x4 = block("e4", x3 + x2)
    b1 = block("bottleneck_0", x4)
    b2 = block("bottleneck_2", b1)
    z = block("bottleneck_4", b2)
    u1 = block("d1", x4 + z) + z
    u2 = block("d2", x3 + u1)
    u3 = block("d3", x2 + u2) + u2
    u4 = block("d4", x1 + u3)
    return block("d5", x0 + u4)


BLOCKS = {
    "std_block": 1,
    "e1": 2,
    "e2": 4,
    "e3": 8,
    "e4": 16,
    "bottleneck_0": 32,
    "bottleneck_2": 32,
    "bottleneck_4": 32,
    "d1": 16,
    "d2": 8,
    "d3": 4,
    "d4": 2,
    "d5": 1,
}
"""Dilation of each block, in the order of the forward pass. Names as in the public PyTorch code."""

DROPOUT_AFTER = ("bottleneck_0", "bottleneck_2")
"""Blocks whose output is dropped out in training."""


class Block(nnx.Module):
    """Two 3x3 convolutions with normalisation, ReLU and a shortcut (Figure 2).

    With c1 = relu(bn1(conv1(x))), a block is relu(bn2(conv2(c1)) + skip). The skip is x for the shortcut "input" (the
    public code), c1 for "conv1" (as the figure is drawn), and nothing for "none" (the first block).
    """

    def __init__(self, name: str, inputs: int, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        filters, batch_norm = config.filters, config.norm == "batch"
        self.name = public_name(name)
        self.dilation = BLOCKS[name]
        self.shortcut = "none" if name == "std_block" else config.shortcut
        self.first = Conv(inputs, filters, init=config.init, dtype=dtype, rngs=rngs)
        self.bnorm1 = BatchNorm(filters, dtype=dtype) if batch_norm else None
        self.second = Conv(filters, filters, init=config.init, dtype=dtype, rngs=rngs)
        self.bnorm2 = BatchNorm(filters, dtype=dtype) if batch_norm else None

    def __call__(self, x: Activation, *, train: bool, execution: Execution) -> Activation:
        """Apply the block layer by layer; arguments as in `conv_norm_relu`."""

        def layer(
            x: Activation, conv: Conv, norm: BatchNorm | None, skip: Activation | None, number: int
        ) -> Activation:
            names = f"{self.name}.{('first', 'second')[number - 1]}", f"{self.name}.bnorm{number}"
            return conv_norm_relu(
                x, conv, norm, skip, dilation=self.dilation, train=train, execution=execution, names=names
            )

        c1 = layer(x, self.first, self.bnorm1, None, 1)
        skip = {"none": None, "input": x, "conv1": c1}[self.shortcut]
        return layer(c1, self.second, self.bnorm2, skip, 2)


class PDRUNet(nnx.Module):
    """The network of Figure 1.

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
    """

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
        self.in_channels = config.in_channels
        self.outputs = config.outputs or 1
        self.dtype = jnp.dtype(param_dtype if dtype is None else dtype)
        self.size = size
        self.mirror = Mirror()
        self.fit: Literal["stretch", "pad"] = fit
        self.spacing = spacing
        self.multilabel = multilabel

        def block(name: str, inputs: int = config.filters) -> Block:
            return Block(name, inputs, config, dtype=param_dtype, rngs=rngs)

        self.std_block = block("std_block", config.in_channels)
        self.e1 = block("e1")
        self.e2 = block("e2")
        self.e3 = block("e3")
        self.e4 = block("e4")
        self.bottleneck_0 = block("bottleneck_0")
        self.bottleneck_2 = block("bottleneck_2")
        self.bottleneck_4 = block("bottleneck_4")
        self.d1 = block("d1")
        self.d2 = block("d2")
        self.d3 = block("d3")
        self.d4 = block("d4")
        self.d5 = block("d5")
        self.final_conv = Conv(config.filters, self.outputs, size=1, init=config.init, dtype=param_dtype, rngs=rngs)

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
            dropout_masks: two boolean (N, H, W, filters) arrays, true where values are kept, instead of a key.
            execution: how and where the pass is computed; by default as `config.conv` says, on one device.

        Returns:
            (N, H, W, outputs), in the parameters' dtype.

        Raises:
            ValueError: a shape that does not fit, training with dropout but without key or masks, or a tap on a mesh.
            UserError: the images cannot be split evenly over the mesh.
        """
        if images.ndim != 4 or images.shape[-1] != self.config.in_channels:
            wanted = f"(N, H, W, {self.config.in_channels})"
            raise ValueError(f"images have the shape {images.shape}; it should be {wanted}")
        if not train or self.config.dropout == 0:
            dropout_masks = ()
        elif dropout_masks is None:
            if dropout_key is None:
                raise ValueError("training with dropout needs dropout_key or dropout_masks")
            dropout_masks = keep_masks(dropout_key, self.config.dropout, (*images.shape[:3], self.config.filters))
        masks = dict(zip(DROPOUT_AFTER, dropout_masks, strict=bool(dropout_masks)))

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

        def block(name: str, x: Activation) -> Activation:
            out = run_block(getattr(self, name), x, train=train, execution=execution)
            if name in masks:
                keep = Activation.of(masks[name], out.limit).in_phases(out.phases).values
                out = out.with_values(dropout(out.values, self.config.dropout, keep))
            return out

        x = wire(block, execution.first_activation(images.astype(self.dtype)))

        # The final 1x1 convolution is a matrix product, in the parameters' dtype.
        kernel, bias = self.final_conv.kernel[...], self.final_conv.bias[...]
        logits = x.image().astype(kernel.dtype) @ kernel[0, 0] + bias.reshape(1, 1, 1, -1)
        if execution.tap is not None:
            execution.tap("final_conv", logits)
        return logits


def public_name(block: str) -> str:
    """The public PyTorch code's name of a block: its bottleneck is a container, `bottleneck.0`."""
    return block.replace("_", ".") if block.startswith("bottleneck") else block


def foreground_classes(outputs: int, *, multilabel: bool = False) -> int:
    """Number of classes without background of a network with this many outputs; all of them if classes overlap."""
    return outputs if multilabel else max(outputs - 1, 1)


@cache
def _validator() -> TypeAdapter[ModelConfig]:
    return TypeAdapter(ModelConfig)
