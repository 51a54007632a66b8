"""`jax.jit` as this network needs it on CPUs: compiler options, order of programs, and a store of compiled ones."""

import contextlib
import importlib
import os
import time
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax

# XLA hands convolutions on CPUs to a library that runs each of them on one core; without it they run on all cores.
_CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": ""}


CLOCKS = 60.0
"""Seconds by which the clocks of a file system and of this machine may differ."""


def dispatch_in_turn() -> None:
    """Let a program on a CPU begin only when the memory of the one before is free. Call it before JAX is used.

    JAX hands programs to threads of its own and counts one as done when its results are there, a moment before its
    temporary memory is given back: the next one would take its own beside it, and the process need both. A step of
    this network keeps every core busy, so that there is nothing to be won by going ahead.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)


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
    given = getattr(jax.config, "jax_compilation_cache_dir", None)  # an attribute that type checkers do not see
    folder = Path(given or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pdrunet_jax")
    if given is None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
    remove_broken_programs(folder)


def remove_broken_programs(folder: Path) -> None:
    """Remove those stored programs that a process was killed while writing.

    JAX writes them in place and never again: a broken one would cost a warning and a compilation at every start. Those
    that were looked at once are not looked at again.
    """
    checked = folder / "checked"
    try:
        since, now = (checked.stat().st_mtime if checked.exists() else 0.0), time.time()
        for path in folder.glob("*-cache"):
            if path.stat().st_mtime >= since - CLOCKS and not _whole(path.read_bytes()):
                path.unlink(missing_ok=True)
        if folder.is_dir():
            checked.touch()
            os.utime(checked, (now, now))
    except OSError:  # a folder on another machine or of another user; JAX says what it cannot use
        return


def _whole(program: bytes) -> bool:
    """Whether a stored program can be unpacked, by what JAX packs with: zstandard where it is installed, else zlib."""
    try:
        zstandard = importlib.import_module("zstandard")
        return bool(zstandard.ZstdDecompressor().decompress(program))
    except ImportError:
        with contextlib.suppress(zlib.error):
            return bool(zlib.decompress(program))
    except zstandard.ZstdError:
        pass
    return False


def jit(function: Callable[..., Any], **options: Any) -> Any:
    """`jax.jit(function, **options)` with `compiler_options()`, and the program kept for the next start."""
    dispatch_in_turn()
    keep_compiled_programs()
    return jax.jit(function, compiler_options=compiler_options(), **options)
