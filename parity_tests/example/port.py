"""The port to Flax."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx


class BatchNorm(nnx.BatchNorm):
    """Batch normalisation that stores the unbiased variance, as PyTorch does. Images (N, H, W, C)."""

    def __call__(self, x: jax.Array) -> jax.Array:
        before = self.var[...]
        output = super().__call__(x)
        if not self.use_running_average:
            pixels, kept = x.size // x.shape[-1], self.momentum * before
            self.var[...] = kept + (self.var[...] - kept) * (pixels / (pixels - 1))
        return output


class Locator(nnx.Module):
    """Images (N, H, W, 3) to three numbers each, (N, 3)."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(3, 8, (3, 3), strides=2, padding=1, use_bias=False, rngs=rngs)
        self.stem_norm = BatchNorm(8, momentum=0.9, epsilon=1e-5, rngs=rngs)
        # In PyTorch: dilation * (size - 1) - padding = 1 on each side, and output_padding = 1 more after it.
        self.up = nnx.ConvTranspose(8, 6, (3, 3), strides=2, padding=((1, 2), (1, 2)), rngs=rngs)
        self.up_norm = nnx.GroupNorm(6, num_groups=2, epsilon=1e-5, rngs=rngs)
        self.mix = nnx.Conv(6, 6, (3, 3), padding=1, rngs=rngs)
        self.head = nnx.Linear(6 * 4 * 4, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.stem_norm(self.stem(x)))
        x = nnx.gelu(self.up_norm(self.up(x)), approximate=False)
        x = self.resize(x)
        x = nnx.max_pool(nnx.relu(self.mix(x)), (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        return self.head(self.flatten(x))

    def resize(self, x: jax.Array) -> jax.Array:
        """Resize to 7x7, corners on corners, which jax.image.resize cannot."""
        for axis in (1, 2):
            x = jnp.moveaxis(jnp.tensordot(corners(x.shape[axis], 7, x.dtype), x, (1, axis)), 0, axis)
        return x

    def flatten(self, x: jax.Array) -> jax.Array:
        """Take all values of an image in PyTorch's order, channels first."""
        return x.transpose(0, 3, 1, 2).reshape(len(x), -1)


def corners(before: int, after: int, dtype: jnp.dtype) -> jax.Array:
    """Weights (after, before) of a bilinear interpolation that keeps the first and the last pixel."""
    place = jnp.linspace(0, before - 1, after, dtype=dtype)[:, None]
    return jnp.maximum(1 - jnp.abs(place - jnp.arange(before)[None]), 0)


def loss(output: jax.Array, target: jax.Array) -> jax.Array:
    """Mean squared error."""
    return ((output - target) ** 2).mean()


OPTIMIZER = optax.chain(optax.add_decayed_weights(1e-2), optax.adam(1e-3))
"""Adam with L2: the decay goes into the moments, as in torch.optim.Adam."""
