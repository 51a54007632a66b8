"""One folder with data, compiled programs and an undisturbed run for all faults."""

import os

import pytest

from tests.support import ROOT
from tests.support.live import CONFIG, Place


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    path = tmp_path_factory.mktemp("faults")
    (path / "tiny.toml").write_text(CONFIG)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "JAX_COMPILATION_CACHE_DIR": str(path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    place = Place(path, environment)
    result = place.train(workdir=place.undisturbed)
    assert result.returncode == 0, result.stderr
    return place
