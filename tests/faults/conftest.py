"""One folder with data, compiled programs and an undisturbed run, shared by all worker processes of the tests."""

import fcntl
import os
import shutil

import pytest

from tests.support import ROOT
from tests.support.live import CONFIG, Place


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    base = tmp_path_factory.getbasetemp()
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "faults"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "JAX_COMPILATION_CACHE_DIR": str(path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    place = Place(path, environment)
    # The first worker compiles and trains while the others wait. A folder without the file `ready` is a failed attempt.
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (path / "ready").exists():
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
            (path / "tiny.toml").write_text(CONFIG)
            result = place.train(workdir=place.undisturbed)
            assert result.returncode == 0, result.stderr
            (path / "ready").touch()
    return place
