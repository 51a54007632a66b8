"""`jax.jit` with the compiler options that this network needs on CPUs, and a store of compiled programs."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
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


@cache
def keep_compiled_programs() -> None:
    """Keep what takes long to compile in the user's cache folder, for the next start.

    JAX's own setting (`JAX_COMPILATION_CACHE_DIR`) takes precedence. A folder that cannot be written costs a warning.
    """
    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:  # an attribute that type checkers do not see
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pdrunet_jax"
        jax.config.update("jax_compilation_cache_dir", str(folder))


def jit(function: Callable[..., Any], **options: Any) -> Any:
    """`jax.jit(function, **options)` with `compiler_options()`, and the program kept for the next start."""
    keep_compiled_programs()
    return jax.jit(function, compiler_options=compiler_options(), **options)
