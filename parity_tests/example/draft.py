"""A first draft of the port, as one writes it with Flax's defaults. Its shapes are right, and it trains."""

import jax
import optax
from flax import nnx

from parity_tests.example import port


class Locator(nnx.Module):
    """Images (N, H, W, 3) to three numbers each, (N, 3)."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(3, 8, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.stem_norm = nnx.BatchNorm(8, rngs=rngs)
        self.up = nnx.ConvTranspose(8, 6, (3, 3), strides=2, rngs=rngs)
        self.up_norm = nnx.GroupNorm(6, num_groups=2, rngs=rngs)
        self.mix = nnx.Conv(6, 6, (3, 3), rngs=rngs)
        self.head = nnx.Linear(6 * 4 * 4, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.stem_norm(self.stem(x)))
        x = nnx.gelu(self.up_norm(self.up(x)))
        x = jax.image.resize(x, (len(x), 7, 7, 6), "bilinear")
        x = nnx.max_pool(nnx.relu(self.mix(x)), (3, 3), strides=(2, 2), padding="SAME")
        return self.head(x.reshape(len(x), -1))


class Corrected(port.Locator):
    """The port with Flax's own batch normalisation."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        super().__init__(rngs=rngs)
        self.stem_norm = nnx.BatchNorm(8, rngs=rngs)


OPTIMIZER = optax.adamw(1e-3, weight_decay=1e-2)
