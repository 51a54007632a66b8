"""Training and validation on 8 virtual devices are those on one; no activation leaves its device."""

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks.sharding import collectives
from pdrunet_jax.runtime.devices import Placement, make_mesh, require_divisible
from pdrunet_jax.runtime.errors import UserError
from tests.support import ROOT
from tests.support import virtual_devices as virtual

DEAD = ("['first']['bias'].value", "['second']['bias'].value", "['running_mean'].value")
"""Arrays that may show rounding noise: biases before a normalisation, whose true gradient is zero, and means after."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("devices")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, virtual.__file__, folder], check=True, env=environment)
    runs = {name: dict(np.load(folder / f"{name}.npz")) for name in virtual.RUNS}
    programs = {name: (folder / f"{name}.txt").read_text() for name in virtual.RUNS}
    return SimpleNamespace(runs=runs, programs=programs)


def differences(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> dict[str, float]:
    assert got.keys() == want.keys()
    return {name: float(np.abs(got[name] - array).max()) for name, array in want.items() if array.dtype == np.float64}


@pytest.mark.parametrize("path", ["fused", pytest.param("plain", marks=pytest.mark.stress)])
def test_training_steps_on_8_devices_are_those_on_one(path: str, results: Any) -> None:
    errors = differences(results.runs[f"{path} on 8"], results.runs[path])
    # On the plain path Adam turns this noise into steps; the fused path has zeros there.
    dead = [errors.pop(name) for name in list(errors) if path == "plain" and name.endswith(DEAD)]
    assert errors["losses"] < 1e-10
    assert max(errors.values()) < 1e-10
    assert max(dead, default=0) < 1e-6


@pytest.mark.stress
def test_accumulation_and_rematerialisation_change_nothing_on_a_mesh(results: Any) -> None:
    errors = differences(results.runs["accumulated, rematerialised on 4"], results.runs["accumulated"])
    assert max(errors.values()) < 1e-10


@pytest.mark.stress
def test_bfloat16_on_a_mesh_is_as_close_as_bfloat16_is(results: Any) -> None:
    got, want = results.runs["bfloat16 on 8"], results.runs["bfloat16"]
    np.testing.assert_allclose(got["losses"], want["losses"], rtol=5e-3)


def test_validation_on_a_mesh_counts_the_same_pixels(results: Any) -> None:
    got, want = results.runs["fused on 8"], results.runs["fused"]
    for name in ("tp", "fp", "fn", "tn", "prediction"):
        np.testing.assert_array_equal(got[f"validation {name}"], want[f"validation {name}"])
    np.testing.assert_allclose(got["validation loss"], want["validation loss"], rtol=0, atol=1e-10)


def test_only_sums_are_sent_between_devices(results: Any) -> None:
    calls = list(collectives(results.programs["fused on 8"]))
    batch = virtual.IMAGES * virtual.SIZE**2  # an activation is larger by the number of filters
    assert calls
    assert max(call.elements for call in calls) < batch
    assert not [call for call in calls if call.kind != "all-reduce" and call.elements > virtual.IMAGES]


def test_a_batch_that_cannot_be_split_evenly_is_refused() -> None:
    mesh: Any = SimpleNamespace(size=2)
    require_divisible(mesh, 4)
    with pytest.raises(UserError, match="3 images cannot be split over 2 devices; give a multiple of 2"):
        require_divisible(mesh, 3)


def test_processes_with_different_numbers_of_devices_are_refused() -> None:
    devices: Any = [SimpleNamespace(process_index=process, id=number) for number, process in enumerate([0, 0, 1])]
    with pytest.raises(UserError, match="the processes have 1 and 2 devices"):
        make_mesh(devices)


@pytest.mark.parametrize(("process", "shard"), [(0, (0, 3)), (2, (2, 3))])
def test_each_process_reads_its_part_of_a_batch(
    process: int, shard: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: Any = [SimpleNamespace(process_index=number // 2, id=number) for number in range(6)]
    monkeypatch.setattr(jax, "process_index", lambda: process)
    assert Placement(SimpleNamespace(devices=np.array(devices))).process_shard == shard


def test_a_mesh_of_one_device_keeps_the_batch() -> None:
    place = Placement(make_mesh(jax.devices()[:1]))
    batch = {"image": np.arange(12, dtype=np.uint8).reshape(3, 2, 2, 1)}
    np.testing.assert_array_equal(place.shard_batch(batch)["image"], batch["image"])
