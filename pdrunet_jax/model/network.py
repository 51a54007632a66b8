"""PDR-UNet, the pure dilated residual U-Net of Shen et al., Inverse Problems and Imaging, doi 10.3934/ipi.2020057.

There is no down- or up-sampling: every layer works at the image's own resolution with the same number of filters.
Dilations double on the way in and halve on the way out, and the long skips are additions.
"""

from collections.abc import Callable, Sequence

from flax import nnx
from jax.typing import DTypeLike

from pdrunet_jax.config import ModelConfig
from pdrunet_jax.model.base import Layers, Network, Part, T
from pdrunet_jax.model.execution import BlockBase, Execution
from pdrunet_jax.model.fast.block import Shortcut
from pdrunet_jax.model.fast.phases import Activation
from pdrunet_jax.model.layers import BatchNorm, Conv, conv_norm_relu


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


class Block(BlockBase):
    """Two 3x3 convolutions with normalisation, ReLU and a shortcut (Figure 2).

    With c1 = relu(bn1(conv1(x))), a block is relu(bn2(conv2(c1)) + skip). The skip is x for the shortcut "input" (the
    public code), c1 for "conv1" (as the figure is drawn), and nothing for "none" (the first block, and U-Net's).
    """

    def __init__(
        self,
        name: str,
        inputs: int,
        filters: int,
        config: ModelConfig,
        *,
        shortcut: Shortcut = "none",
        dilation: int = 1,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        batch_norm = config.norm == "batch"
        self.name = name
        self.dilation = dilation
        self.shortcut = shortcut
        self.first = Conv(inputs, filters, init=config.init, dtype=dtype, rngs=rngs)
        self.bnorm1 = BatchNorm(filters, dtype=dtype) if batch_norm else None
        self.second = Conv(filters, filters, init=config.init, dtype=dtype, rngs=rngs)
        self.bnorm2 = BatchNorm(filters, dtype=dtype) if batch_norm else None

    @property
    def pair(self) -> tuple[tuple[Conv, BatchNorm], tuple[Conv, BatchNorm]] | None:
        """Both layers, for `layers.fused_training_block`; None without normalisation by the batch's statistics."""
        if self.bnorm1 is None or self.bnorm2 is None or self.bnorm1.frozen or self.bnorm2.frozen:
            return None
        return (self.first, self.bnorm1), (self.second, self.bnorm2)

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


class PDRUNet(Network):
    """The network of Figure 1."""

    @classmethod
    def parts(cls, config: ModelConfig) -> list[Part]:
        """The blocks, in the order of the forward pass."""
        first, filters = config.in_channels, config.filters
        return [Part("block", name, first if name == "std_block" else filters, filters) for name in BLOCKS]

    def make(self, part: Part, dtype: DTypeLike, rngs: nnx.Rngs) -> Block:
        """Make a block, with initial weights."""
        return Block(
            public_name(part.name),
            part.inputs,
            part.outputs,
            self.config,
            shortcut="none" if part.name == "std_block" else self.config.shortcut,
            dilation=BLOCKS[part.name],
            dtype=dtype,
            rngs=rngs,
        )

    @property
    def radius(self) -> int:
        """Radius of the receptive field, 316 pixels: two 3x3 convolutions a block, each as wide as its dilation."""
        return 2 * sum(BLOCKS.values())

    def dropout_shapes(self, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Shapes of the dropout masks for images of `shape`, by the block that they follow."""
        return {name: (*shape[:3], self.config.filters) for name in DROPOUT_AFTER}

    def wire(self, layers: Layers[T], x: T) -> T:
        """Apply all blocks but the last layer to the first activation."""
        return wire(layers.block, x)


def public_name(block: str) -> str:
    """The public PyTorch code's name of a block: its bottleneck is a container, `bottleneck.0`."""
    return block.replace("_", ".") if block.startswith("bottleneck") else block
