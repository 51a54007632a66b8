"""Settings for every test: the long form, strict array shapes, and one store of compiled programs."""

import os
from pathlib import Path

import pytest

UNOPTIMISED = ("faults", "distributed", "train", "export", "compare", "convert", "model", "data")
"""Folders whose tests check what programs do, not how well they are compiled; those that take longest come first.

In the short form XLA leaves out its last optimisations there, which take most of its time; tests marked `optimised` get
programs as users have them, as do the other folders.
"""
SWITCH = "JAX_DISABLE_MOST_OPTIMIZATIONS"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--stress", action="store_true", help="run the long form too (make stress); same as STRESS=1")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "stress: long form only, with --stress or STRESS=1")
    config.addinivalue_line("markers", "optimised: with all optimisations of XLA, wherever it is")
    if config.getoption("--stress"):
        os.environ["STRESS"] = "1"  # read by tests.support.LONG and by the other processes of a test
    # Compiling takes far longer than running these small networks, and many tests compile the same ones.
    cache = getattr(config, "cache", None)  # absent under `-p no:cacheprovider`
    if cache is not None:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache.mkdir("jax")))
        os.environ.setdefault("XDG_CACHE_HOME", str(cache.mkdir("home")))  # traced programs, not in the user's folder
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    import jax

    jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files that take long come first, so that no worker is left with one of them at the end. Each worker switches the
    # optimisations once.
    order = {name: place for place, name in enumerate(UNOPTIMISED)}
    items.sort(key=lambda item: order.get(item.path.parent.name, len(order)))
    if not os.environ.get("STRESS"):
        for item in items:
            if item.get_closest_marker("stress"):
                item.add_marker(pytest.mark.skip(reason="long form: make stress"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    marked = item.get_closest_marker("optimised")
    optimise(item.path.parent.name not in UNOPTIMISED or marked is not None or bool(os.environ.get("STRESS")))


def pytest_runtest_teardown(nextitem: pytest.Item | None) -> None:
    if nextitem is not None and not nextitem.path.is_relative_to(Path(__file__).parent):
        optimise(True)


def optimise(wanted: bool) -> None:
    """Compile with or without the last optimisations from now on, in this process and those that it starts."""
    import jax

    if (os.environ.get(SWITCH) != "True") != wanted:
        jax.clear_caches()
        jax.config.update(SWITCH.lower(), not wanted)
        os.environ[SWITCH] = str(not wanted)
