"""`jax.jit` for this network: XLA options for CPUs, synchronous dispatch, a persistent cache of compiled programs."""

import os
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import jax

from pdrunet_jax.runtime.store import cache_folder

R = TypeVar("R")

# XLA hands convolutions on CPUs to a library that runs each of them on one core; without it they run on all cores.
_CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": ""}


def jit(function: Callable[..., R], **options: Any) -> Callable[..., R]:
    """`jax.jit(function, **options)` with `compiler_options()`, synchronous dispatch and the compilation cache."""
    disable_async_dispatch()
    enable_compilation_cache()
    return jax.jit(function, compiler_options=compiler_options(), **options)


def disable_async_dispatch() -> None:
    """Start a program on a CPU only after the memory of the previous one is free. Call this before JAX is used.

    JAX runs programs on its own threads and reports one as done when its results are ready, a moment before its
    temporary memory is freed. The next program would then allocate its own on top, and the process need both. A step of
    this network keeps all cores busy, so running ahead gains nothing.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)


@cache
def enable_compilation_cache() -> None:
    """Cache compiled programs in the user's cache folder for the next start.

    Small programs too: drawing the initial weights takes a dozen, and compiling them two seconds. JAX's own settings
    (`JAX_COMPILATION_CACHE_DIR`, `JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS`) take precedence. If the folder cannot be
    written, or an entry in it cannot be read, JAX warns and compiles. A user without a home, or a folder with a pipe in
    it, has no cache.
    """
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:  # an attribute that type checkers do not see
        if (folder := cache_folder()) is None:
            return
        try:
            items = os.scandir(folder) if folder.is_dir() else ()
            odd = [item.name for item in items if not item.is_file() and not item.is_dir()]
        except OSError:  # a folder that cannot be read
            return
        if odd:  # JAX would wait for a pipe
            what = f"{folder} holds {odd[0]}, which is no file"
            print(f"warning: {what}; compiled programs are not cached until it is removed", file=sys.stderr)
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))


@cache
def compiler_options() -> dict[str, Any]:
    """Options for the default backend; empty where there are none.

    A version of XLA that does not know them costs speed: warns on standard error.
    """
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda x: x, compiler_options=_CPU_OPTIONS).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        names = ", ".join(_CPU_OPTIONS)
        print(f"warning: JAX {jax.__version__} has no option {names}: steps take longer on CPUs", file=sys.stderr)
        return {}
    return _CPU_OPTIONS
