"""A folder for runs, data and compiled programs, and the run of a single process."""

import os
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.together import CONFIG, Site, ends


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    path = tmp_path_factory.mktemp("distributed")
    (path / "tiny.toml").write_text(CONFIG)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "JAX_COMPILATION_CACHE_DIR": str(path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return Site(path, environment)


@pytest.fixture(scope="session")
def alone(site: Site) -> Path:
    """The run of a single process on a single device."""
    run = site.path / "alone"
    [(code, _, err)] = ends([site.train(run)])
    assert (code, err) == (0, "")
    return run
