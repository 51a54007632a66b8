"""Settings for every test: the long form, strict array shapes, and one store of compiled programs."""

import os

import pytest

LONGEST = ("faults", "distributed", "train", "export", "convert")
"""Folders with the tests that take longest."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--stress", action="store_true", help="run the long form too (make stress); same as STRESS=1")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "stress: long form only, with --stress or STRESS=1")
    if config.getoption("--stress"):
        os.environ["STRESS"] = "1"  # read by tests.support.LONG and by the other processes of a test
    # Compiling takes far longer than running these small networks, and many tests compile the same ones.
    cache = getattr(config, "cache", None)  # absent under `-p no:cacheprovider`
    if cache is not None:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache.mkdir("jax")))
        os.environ.setdefault("XDG_CACHE_HOME", str(cache.mkdir("home")))  # traced programs, not in the user's folder
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    import jax

    jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files that take long come first, so that no worker is left with one of them at the end.
    items.sort(key=lambda item: item.path.parent.name not in LONGEST)
    if not os.environ.get("STRESS"):
        for item in items:
            if item.get_closest_marker("stress"):
                item.add_marker(pytest.mark.skip(reason="long form: make stress"))
