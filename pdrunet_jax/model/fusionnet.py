"""FusionNet of Quan, Hildebrand and Jeong (2016, arXiv 1612.05360), to compare PDR-UNet with.

Every level is a residual block between two convolutions, and skips are additions. Convolutions are padded with zeros;
batch normalisation and ReLU follow each of them. Width, depth and resampling are options.
"""

from collections.abc import Sequence

from flax import nnx
from jax.typing import DTypeLike

from pdrunet_jax.config import ModelConfig
from pdrunet_jax.model.execution import BlockBase, Execution
from pdrunet_jax.model.fast.phases import Activation
from pdrunet_jax.model.layers import BatchNorm, Conv, conv_norm_relu
from pdrunet_jax.model.pyramid import Pyramid

CONVOLUTIONS = 5
"""Of a level: one, the three of a residual block, and one."""


class Level(BlockBase):
    """c5(c1(x) + c4(c3(c2(c1(x))))), where each c is a 3x3 convolution with normalisation and ReLU."""

    def __init__(
        self, name: str, inputs: int, outputs: int, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.name = name
        for number in range(1, CONVOLUTIONS + 1):
            channels = inputs if number == 1 else outputs
            setattr(self, f"conv{number}", Conv(channels, outputs, init=config.init, dtype=dtype, rngs=rngs))
            setattr(self, f"bnorm{number}", BatchNorm(outputs, dtype=dtype) if config.norm == "batch" else None)

    def __call__(self, x: Activation, *, train: bool, execution: Execution) -> Activation:
        """Apply the level; arguments as in `conv_norm_relu`."""

        def layer(number: int, x: Activation) -> Activation:
            conv, norm = getattr(self, f"conv{number}"), getattr(self, f"bnorm{number}")
            names = f"{self.name}.conv{number}", f"{self.name}.bnorm{number}"
            return conv_norm_relu(x, conv, norm, None, dilation=1, train=train, execution=execution, names=names)

        c1 = layer(1, x)
        return layer(5, c1 + layer(4, layer(3, layer(2, c1))))


class FusionNet(Pyramid):
    """Residual blocks, and skips that are added (Figure 2). A transposed convolution is normalised like any other."""

    block_layers = tuple((f"conv{number}", f"bnorm{number}") for number in range(1, CONVOLUTIONS + 1))
    concatenated = False
    transposed_size = 3
    up_activated = True

    def make_block(self, name: str, inputs: int, outputs: int, dtype: DTypeLike, rngs: nnx.Rngs) -> Level:
        """Make the convolutions of a level."""
        return Level(name, inputs, outputs, self.config, dtype=dtype, rngs=rngs)

    def dropout_shapes(self, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """No dropout, as in the paper."""
        return {}
