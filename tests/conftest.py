"""Strictness for every test, and one store of compiled programs for this process and those that tests start."""

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    # Compiling takes far longer than these small networks run, and many tests compile the same ones.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("jax")))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    import jax

    jax.config.update("jax_numpy_rank_promotion", "raise")
