"""Networks that halve the resolution level by level and double it again, with skips across: U-Net and FusionNet."""

from collections.abc import Sequence

from flax import nnx
from jax.typing import DTypeLike

from pdrunet_jax.config import ModelConfig
from pdrunet_jax.model.base import Layers, Network, Part, T
from pdrunet_jax.model.execution import BlockBase
from pdrunet_jax.model.layers import Conv
from pdrunet_jax.model.resampling import Up


class Pyramid(Network):
    """A block a level on the way down and on the way up. A subclass says which blocks and which skips.

    Level l has `config.filters` * 2^l channels; l is 0 at the image's own resolution and `config.depth` at the bottom.
    """

    concatenated: bool
    """Whether skips are concatenated; otherwise added."""
    transposed_size: int
    """Side of the kernel of the transposed convolutions."""
    up_activated: bool
    """Whether normalisation and ReLU follow a transposed convolution."""

    def make_block(self, name: str, inputs: int, outputs: int, dtype: DTypeLike, rngs: nnx.Rngs) -> BlockBase:
        """Make the block of a level."""
        raise NotImplementedError

    @classmethod
    def parts(cls, config: ModelConfig) -> list[Part]:
        """The parts with weights, in the order of the forward pass, without the last layer."""
        widths = [config.filters * 2**level for level in range(config.depth + 1)]
        parts, inputs = [], config.in_channels
        for level, width in enumerate(widths[:-1]):
            parts.append(Part("block", f"encoder_{level}", inputs, width))
            if config.down == "stride":
                parts.append(Part("down", f"down_{level}", width, width, normalised=False))
            inputs = width
        parts.append(Part("block", "bottom", inputs, widths[-1]))
        size = cls.transposed_size if config.up == "transposed" else 1
        for level in reversed(range(config.depth)):
            width = widths[level]
            parts.append(Part("up", f"up_{level}", widths[level + 1], width, size, cls.up_activated))
            parts.append(Part("block", f"decoder_{level}", 2 * width if cls.concatenated else width, width))
        return parts

    def make(self, part: Part, dtype: DTypeLike, rngs: nnx.Rngs) -> object:
        """Make a part, with initial weights."""
        kind, name, inputs, outputs, size, normalised = part
        if kind == "block":
            return self.make_block(name, inputs, outputs, dtype, rngs)
        if kind == "down":
            return Conv(inputs, outputs, init=self.config.init, dtype=dtype, rngs=rngs)
        return Up(name, inputs, outputs, self.config, size=size, activated=normalised, dtype=dtype, rngs=rngs)

    @property
    def multiple(self) -> int:
        """Side of the square that becomes one pixel of the lowest level."""
        return int(2**self.config.depth)

    @property
    def radius(self) -> int:
        """Radius of the receptive field in pixels, or a little more."""
        # A convolution reaches one pixel of its level. Resampling, on both ways, reaches two pixels of the level above.
        convolutions, above = len(self.block_layers), sum(2**level for level in range(self.config.depth))
        return int((2 * convolutions + 4) * above + convolutions * self.multiple)

    def level_shapes(self, shape: Sequence[int]) -> list[tuple[int, ...]]:
        """Shape of the activations of each level for images of `shape`."""
        n, height, width = shape[:3]
        shapes: list[tuple[int, ...]] = []
        for level in range(self.config.depth + 1):
            shapes.append((n, height, width, self.config.filters * 2**level))
            # A strided convolution keeps half a square at the border, which pooling leaves out.
            height, width = ((side + (self.config.down == "stride")) // 2 for side in (height, width))
        return shapes

    def wire(self, layers: Layers[T], x: T) -> T:
        """Apply all parts but the last layer to the first activation."""
        skips = []
        for level in range(self.config.depth):
            skips.append(layers.block(f"encoder_{level}", x))
            x = layers.down(f"down_{level}", skips[-1])
        x = layers.block("bottom", x)
        for level in reversed(range(self.config.depth)):
            skip = skips[level]
            x = layers.up(f"up_{level}", x, skip)
            x = layers.block(f"decoder_{level}", layers.join(skip, x) if self.concatenated else skip + x)
        return x
