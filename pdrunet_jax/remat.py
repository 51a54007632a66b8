"""Rematerialisation: a gradient that keeps a function's inputs only, and computes the rest a second time."""

from collections.abc import Callable
from typing import Any

import jax

from pdrunet_jax import shards


def recomputed(function: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
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
