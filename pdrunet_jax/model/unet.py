"""U-Net of Ronneberger, Fischer and Brox (MICCAI 2015, arXiv 1505.04597), to compare PDR-UNet with.

It differs from the paper as U-Nets do today: zero padding, so that masks are as large as images, and batch
normalisation after each 3x3 convolution. Width, depth and resampling are options.
"""

from collections.abc import Sequence

from flax import nnx
from jax.typing import DTypeLike

from pdrunet_jax.model.network import Block
from pdrunet_jax.model.pyramid import Pyramid


class UNet(Pyramid):
    """Two convolutions a level on the way down and on the way up; skips are concatenated (Figure 1)."""

    concatenated = True
    transposed_size = 2
    up_activated = False

    def make_block(self, name: str, inputs: int, outputs: int, dtype: DTypeLike, rngs: nnx.Rngs) -> Block:
        """Make the two convolutions of a level."""
        return Block(name, inputs, outputs, self.config, dtype=dtype, rngs=rngs)

    def dropout_shapes(self, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Shapes of the dropout masks: at the end of the way down, as in the paper."""
        return dict(zip((f"encoder_{self.config.depth - 1}", "bottom"), self.level_shapes(shape)[-2:], strict=True))
