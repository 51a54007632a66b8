"""Cutting an activation into parts that stay in the caches from one operation to the next.

Rematerialisation: a gradient that keeps a function's inputs only, and computes the rest a second time.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pdrunet_jax.model import sharding as shards

PART_PIXELS = 32_768
"""Pixels of one chunk of `map_chunks`, at most: two layers of 40 channels then stay in the caches."""

LARGE = 3e38
"""Close to the largest number of float32. A larger one would change nothing but the time."""


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`; 1 where there is none."""
    return max((count for count in range(1, min(number, most) + 1) if number % count == 0), default=1)


def map_chunks(function: Callable[[jax.Array], jax.Array], x: jax.Array, pixels: int | None = None) -> jax.Array:
    """`function` of `x` (N, H, W, C), which treats images one by one, taken in parts of at most `pixels` pixels.

    What one part leaves in the caches is there for its next layer; a whole batch would be fetched from memory by each.
    With phases (see `pdrunet_jax.phases`) even a single image has parts. `pixels` is `PART_PIXELS` when None.
    """
    n, h, w, _ = x.shape
    count = largest_divisor(n, (PART_PIXELS if pixels is None else pixels) // (h * w))
    if count == n:
        return function(x)
    parts = x.reshape(n // count, count, *x.shape[1:])
    results = map_into(lambda i: function(lax.dynamic_index_in_dim(parts, i, keepdims=False)), n // count, x)
    return results.reshape(n, *results.shape[2:])


def map_into(function: Callable[[jax.Array], jax.Array], count: int, x: jax.Array) -> jax.Array:
    """`jax.lax.map` of `function` over 0 to `count` - 1, for a function of `x`: (count, ...).

    `jax.lax.map` collects results in an array of zeros; XLA sets these up for all loops of a program before the first
    begins, and keeps them all in memory. Here they begin as a value of `x`, and so not before it is known: one from its
    middle, because what is put around it is known early.
    """
    part = jax.eval_shape(function, 0)
    start = jnp.full((count, *part.shape), x.ravel()[x.size // 2].astype(part.dtype))
    return lax.fori_loop(0, count, lambda i, all: lax.dynamic_update_index_in_dim(all, function(i), i, 0), start)


def _materialised(x: jax.Array) -> jax.Array:
    # What XLA computes again of bfloat16 it leaves in float32 on the way; memory would round it.
    if jax.default_backend() != "cpu" or x.dtype.itemsize < 4:
        return x
    first = x.ravel()[0]
    _, x = lax.while_loop(
        lambda carry: carry[0] < jnp.where(first > LARGE, 2, 1),
        lambda carry: (carry[0] + 1, lax.dynamic_update_slice(carry[1], first.reshape(1, 1, 1, 1), (0, 0, 0, 0))),
        (0, x),
    )
    return x


force_materialize = jax.custom_vjp(_materialised)
force_materialize.__doc__ = """`x` (N, H, W, C), which those who use it read from memory.

XLA on CPUs may have each of them compute it again from what it is made of, a transposition included, and keep that in
memory until the last has done so, beside `x` itself. It drops `jax.lax.optimization_barrier` and does not look through
a loop of which it cannot say how often it runs: once, to write an element that is there already.
"""
force_materialize.defvjp(lambda x: (_materialised(x), None), lambda _, gradient: (gradient,))


def checkpoint_block(function: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    """`function`, of which nothing but its arguments is kept from the forward to the backward pass.

    `jax.checkpoint` means the same, but on CPUs XLA drops the barrier that should hold the second computation back, and
    does all of them as soon as their inputs are there: nothing is saved. Here the second computation depends on the
    gradient that it is for.

    Args:
        function: takes parameters, statistics and an activation, as trees of arrays; returns the result, and new
            statistics, through which no gradient flows.
    """

    @jax.custom_vjp
    def call(params: Any, stats: Any, x: Any) -> tuple[Any, Any]:
        return function(params, stats, x)

    def forward(params: Any, stats: Any, x: Any) -> tuple[tuple[Any, Any], tuple[Any, Any, Any]]:
        return function(params, stats, x), (params, stats, x)

    def backward(saved: tuple[Any, Any, Any], gradients: tuple[Any, Any]) -> tuple[Any, None, Any]:
        params, stats, x = saved
        # Zero, or NaN where the gradient is not finite: the result is then NaN as it would be without this.
        zero = shards.total(0 * jax.tree.leaves(gradients[0])[0].ravel()[0])
        params = jax.tree.map(lambda value: value + zero.astype(value.dtype), params)
        _, pull, _ = jax.vjp(lambda params, x: function(params, stats, x), params, x, has_aux=True)
        d_params, d_x = pull(gradients[0])
        return d_params, None, d_x

    call.defvjp(forward, backward)
    return call
