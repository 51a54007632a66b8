"""One network on 8 virtual devices against the same on one: training, validation, and what the program sends."""

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks.collectives import collectives
from pdrunet_jax.model.network import BLOCKS
from pdrunet_jax.model.sharding import check_images
from pdrunet_jax.runtime.devices import data_share, make_mesh, place_batch
from pdrunet_jax.runtime.errors import UserError
from tests.support import ROOT
from tests.support.virtual_devices import PROGRAM, PROGRAM_ROWS, PROGRAM_SIZE, RUNS

FILTERS = 40

DEAD = ("['first']['bias'].value", "['second']['bias'].value", "['running_mean'].value")
"""Where rounding noise may show: biases before a normalisation, whose true gradient is zero, and what follows them."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("devices")
    command = [sys.executable, ROOT / "tests/support/virtual_devices.py", folder]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    runs = {name: dict(np.load(folder / f"{name}.npz")) for name in RUNS}
    return SimpleNamespace(runs=runs, program=(folder / PROGRAM).read_text())


def differences(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> dict[str, float]:
    assert got.keys() == want.keys()
    return {name: float(np.abs(got[name] - array).max()) for name, array in want.items() if array.dtype == np.float64}


@pytest.mark.parametrize("path", ["fused", pytest.param("plain", marks=pytest.mark.stress)])
def test_twenty_steps_on_8_devices_are_those_on_one(path: str, results: Any) -> None:
    errors = differences(results.runs[f"{path} on 8"], results.runs[path])
    # On the plain path Adam makes steps of the noise; the fused one has zeros there.
    dead = [errors.pop(name) for name in list(errors) if path == "plain" and name.endswith(DEAD)]
    assert errors["losses"] < 1e-10
    assert max(errors.values()) < 1e-10
    assert max(dead, default=0) < 1e-6


def test_split_rows_accumulation_and_rematerialisation_change_nothing(results: Any) -> None:
    errors = differences(results.runs["rows, rematerialised on 4 x 2"], results.runs["rows"])
    assert max(errors.values()) < 1e-10


def test_bfloat16_on_a_mesh_is_as_near_as_bfloat16_is(results: Any) -> None:
    got, want = results.runs["bfloat16 on 8"], results.runs["bfloat16"]
    np.testing.assert_allclose(got["losses"], want["losses"], rtol=5e-3)


def test_validation_on_a_mesh_gives_each_image_the_same(results: Any) -> None:
    got, want = results.runs["rows, rematerialised on 4 x 2"], results.runs["rows"]
    for name in ("tp", "fp", "fn", "tn", "prediction"):
        np.testing.assert_array_equal(got[f"validation {name}"], want[f"validation {name}"])
    np.testing.assert_allclose(got["validation loss"], want["validation loss"], rtol=0, atol=1e-10)


def test_split_rows_are_sent_to_neighbours_and_no_activation_is_gathered(results: Any) -> None:
    calls = list(collectives(results.program))
    activation = PROGRAM_SIZE**2 * FILTERS
    assert not [call for call in calls if call.kind in ("all-gather", "all-to-all") and call.elements >= activation]
    assert max(call.elements for call in calls if call.kind == "all-reduce") < activation / PROGRAM_ROWS
    sent = [call for call in calls if call.kind == "collective-permute"]
    # Up and down: the inputs of all convolutions, and the gradients of their results but for the first one's.
    assert len(sent) == 2 * (4 * len(BLOCKS) - 1)
    rows = 2 * (4 * sum(BLOCKS.values()) - 1)
    halo = rows * PROGRAM_SIZE * FILTERS
    image = PROGRAM_SIZE * (FILTERS - 1) * 2  # the first convolution's input has one channel
    assert sum(call.elements for call in sent) == halo - image


def test_a_mesh_that_does_not_fit_says_what_would() -> None:
    device = jax.devices()[0]
    with pytest.raises(UserError, match=r"rows = 2: 1 devices can be split by 1"):
        make_mesh(2, [device])
    mesh = SimpleNamespace(shape={"data": 2, "rows": 4})
    with pytest.raises(UserError, match="3 images cannot be spread over 2 devices; give a multiple of 2"):
        check_images(mesh, 3, 128)
    with pytest.raises(UserError, match=r"192 rows .* 4 parts.* multiple of 128, or rows = 3"):
        check_images(mesh, 2, 192)
    check_images(mesh, 2, 128)


def test_processes_that_hold_rows_of_the_same_images_have_the_same_share_of_a_batch() -> None:
    def share(processes: list[list[int]]) -> tuple[int, int]:
        devices = [[SimpleNamespace(process_index=process) for process in row] for row in processes]
        return data_share(SimpleNamespace(devices=np.array(devices), shape={"data": len(devices)}))

    assert share([[0], [0], [1], [1]]) == (0, 2)
    assert share([[1], [1], [0], [0]]) == (1, 2)
    assert share([[2, 2], [1, 1], [0, 0]]) == (2, 3)
    assert share([[1, 1, 2, 2], [3, 3, 0, 0]]) == (1, 2)


def test_a_mesh_of_one_device_takes_any_size_and_keeps_the_batch() -> None:
    mesh = make_mesh(devices=jax.devices()[:1])
    check_images(mesh, 3, 97)
    batch = {"image": np.arange(12, dtype=np.uint8).reshape(3, 2, 2, 1)}
    np.testing.assert_array_equal(place_batch(mesh, batch)["image"], batch["image"])
