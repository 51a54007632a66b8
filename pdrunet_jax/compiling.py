"""`jax.jit` with the compiler options that this network needs on CPUs."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax

# XLA hands convolutions on CPUs to a library that runs each of them on one core; without it they run on all cores.
_CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": ""}


@cache
def compiler_options() -> dict[str, Any]:
    """The options for the default backend; empty where there are none or this version of XLA does not know them."""
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda x: x, compiler_options=_CPU_OPTIONS).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return _CPU_OPTIONS


def jit(function: Callable[..., Any], **options: Any) -> Any:
    """`jax.jit(function, **options)` with `compiler_options()`."""
    return jax.jit(function, compiler_options=compiler_options(), **options)
