"""Work around XLA's choices on CPUs: chunks that fit the caches, forced materialisation, rematerialisation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pdrunet_jax.model.sharding import psum

CHUNK_PIXELS = 32_768
"""Most pixels of one chunk of `map_chunks`: two layers of 40 channels then stay in the caches."""

LARGE = 3e38
"""Close to the largest float32. A larger value would change nothing but the time."""


def on_cpu() -> bool:
    """Whether programs run on a CPU, where XLA needs the help of this package."""
    return jax.default_backend() == "cpu"


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`, or 1."""
    return max((count for count in range(1, min(number, most) + 1) if number % count == 0), default=1)


def map_chunks(function: Callable[[jax.Array], jax.Array], x: jax.Array, pixels: int | None = None) -> jax.Array:
    """Apply `function`, which treats images independently, to chunks of `x` (N, H, W, C).

    The output of one layer is then still in the caches for the next. Phases count as images, so that a single image has
    chunks too. A chunk has at most `pixels` pixels, `CHUNK_PIXELS` when None.
    """
    n, h, w, _ = x.shape
    count = largest_divisor(n, (CHUNK_PIXELS if pixels is None else pixels) // (h * w))
    if count == n or not on_cpu():
        return function(x)
    chunks = x.reshape(n // count, count, *x.shape[1:])
    results = map_into(lambda i: function(lax.dynamic_index_in_dim(chunks, i, keepdims=False)), n // count, x)
    return results.reshape(n, *results.shape[2:])


def map_into(function: Callable[[jax.Array], jax.Array], count: int, x: jax.Array) -> jax.Array:
    """Compute `jax.lax.map(function, jnp.arange(count))`, for a function of `x`: (count, ...).

    `jax.lax.map` collects results in an array of zeros. XLA creates those arrays for all loops of a program before the
    first loop begins and keeps them all in memory. Here the array starts as a value of `x`, so it cannot exist before
    `x` does. The value is from the middle, since padding at the borders is known early.
    """
    part = jax.eval_shape(function, 0)
    start = jnp.full((count, *part.shape), x.ravel()[x.size // 2].astype(part.dtype))
    return lax.fori_loop(0, count, lambda i, all: lax.dynamic_update_index_in_dim(all, function(i), i, 0), start)


def _force_materialize(x: jax.Array) -> jax.Array:
    # XLA keeps recomputed bfloat16 values in float32 on the way; memory would round them.
    if not on_cpu() or x.dtype.itemsize < 4:
        return x
    first = x.ravel()[0]
    _, x = lax.while_loop(
        lambda carry: carry[0] < jnp.where(first > LARGE, 2, 1),
        lambda carry: (carry[0] + 1, lax.dynamic_update_slice(carry[1], first.reshape(1, 1, 1, 1), (0, 0, 0, 0))),
        (0, x),
    )
    return x


force_materialize = jax.custom_vjp(_force_materialize)
force_materialize.__doc__ = """Return `x` (N, H, W, C) so that its users read it from memory.

XLA on CPUs may let each user compute it again from its inputs, transpositions included, and keep those in memory until
the last user is done. It drops `jax.lax.optimization_barrier`, but does not look through a loop whose number of
iterations it cannot tell: this one runs once and writes an element that is already there.
"""
force_materialize.defvjp(lambda x: (_force_materialize(x), None), lambda _, gradient: (gradient,))


def checkpoint_block(function: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    """Make `function` keep only its arguments for the backward pass, like `jax.checkpoint`.

    On CPUs, XLA drops the barrier that holds back the second computation of `jax.checkpoint` and runs all of them as
    soon as their inputs are there, which saves nothing. Here the second computation depends on the incoming gradient.
    `function` takes parameters, statistics and an activation, as trees of arrays. It returns the result, and new
    statistics, through which no gradient flows.
    """

    @jax.custom_vjp
    def call(params: Any, stats: Any, x: Any) -> tuple[Any, Any]:
        return function(params, stats, x)

    def forward(params: Any, stats: Any, x: Any) -> tuple[tuple[Any, Any], tuple[Any, Any, Any]]:
        return function(params, stats, x), (params, stats, x)

    def backward(saved: tuple[Any, Any, Any], gradients: tuple[Any, Any]) -> tuple[Any, None, Any]:
        params, stats, x = saved
        # Zero, or NaN where the gradient is not finite: the result would be NaN then anyway.
        zero = psum(0 * jax.tree.leaves(gradients[0])[0].ravel()[0])
        params = jax.tree.map(lambda value: value + zero.astype(value.dtype), params)
        _, pull, _ = jax.vjp(lambda params, x: function(params, stats, x), params, x, has_aux=True)
        d_params, d_x = pull(gradients[0])
        return d_params, None, d_x

    call.defvjp(forward, backward)
    return call
