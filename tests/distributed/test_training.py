"""Training by several processes and devices gives the run of one, whatever happens to them."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.together import (
    SAVE_EVERY,
    STEPS,
    Site,
    assert_close_runs,
    assert_same_state,
    ends,
    steps_of,
    wait_for,
)

DEATH = 60
"""Seconds within which all processes end after one of them has died."""


def undisturbed(site: Site, count: int) -> Path:
    """The run of so many processes; trained once."""
    run = site.path / f"undisturbed-by-{count}"
    if not run.exists():
        with site.train_together(run, count) as processes:
            found = ends(processes)
        assert [(code, err) for code, _, err in found] == [(0, "")] * count
        assert all("step 1/" not in out and "validation" not in out for _, out, _ in found[1:])
    return run


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.stress)])
def test_several_processes_train_as_one_does(site: Site, alone: Path, count: int) -> None:
    assert_close_runs(undisturbed(site, count), alone)


@pytest.mark.stress
def test_processes_that_are_stopped_and_killed_train_as_one_does(site: Site, alone: Path) -> None:
    run = site.path / "disturbed"

    with site.train_together(run, 2) as processes:
        wait_for(run, 2, processes)
        processes[1].send_signal(signal.SIGTERM)
        stopped = ends(processes)
    assert [code for code, _, _ in stopped] == [75, 75]
    step = int(re.findall(r"asked to stop \(SIGTERM\): saved at step (\d+)", stopped[0][1])[0])
    assert step == steps_of(run)[-1] < STEPS

    with site.train_together(run, 2) as processes:
        wait_for(run, 12, processes)
        began = time.monotonic()
        processes[1].kill()
        killed = ends(processes)
        assert time.monotonic() - began < DEATH
    assert f"resumed {run} at step {step}" in killed[0][1]
    assert killed[0][0] not in (0, 2, 75)

    with site.train_together(run, 2) as processes:
        finished = ends(processes)
    assert [(code, err) for code, _, err in finished] == [(0, "")] * 2
    assert f"resumed {run} at step 10" in finished[0][1]
    assert_close_runs(run, alone)


@pytest.mark.stress
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [0, 1, 3])
def test_when_any_process_dies_or_hangs_the_others_end_and_the_run_resumes(
    site: Site, victim: int, signal_number: signal.Signals
) -> None:
    run = site.path / f"{signal_number.name}-{victim}"
    with site.train_together(run, 4) as processes:
        wait_for(run, SAVE_EVERY + 2, processes)
        began = time.monotonic()
        processes[victim].send_signal(signal_number)
        others = [process for index, process in enumerate(processes) if index != victim]
        codes = [code for code, _, _ in ends(others)]
        assert time.monotonic() - began < DEATH
    assert 0 not in codes
    with site.train_together(run, 4) as processes:
        assert [code for code, _, _ in ends(processes)] == [0] * 4
    assert_same_state(run, undisturbed(site, 4))


@pytest.mark.stress
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_a_run_saved_on_4_devices_resumes_on_another_number(site: Site, alone: Path, devices: int) -> None:
    saved, run = site.path / "on-4", site.path / f"on-4-then-{devices}"
    if not saved.exists():
        with site.train(saved, devices=4) as process:
            wait_for(saved, SAVE_EVERY + 1, [process])
            process.kill()
            process.communicate()
    shutil.copytree(saved, run)
    [(code, out, err)] = ends([site.train(run, devices=devices)])
    assert (code, err) == (0, "")
    assert devices == 1 or f"{devices} devices" in out.splitlines()[0]
    assert f"resumed {run} at step " in out
    assert_close_runs(run, alone)


@pytest.mark.parametrize(
    ("options", "own", "message"),
    [
        ([[], ["--seed", 4]], 1, "seed: 3 -> 4"),
        ([["--data.root", "tiny.toml"], []], 0, "tiny.toml"),
        ([[], ["--data.root", "tiny.toml"]], 1, "tiny.toml"),
    ],
)
def test_a_process_with_bad_input_ends_all_and_says_why(
    site: Site, options: list[list[object]], own: int, message: str
) -> None:
    run = site.path / "bad"
    began = time.monotonic()
    with site.train_together(run, 2, each=options) as processes:
        found = ends(processes)
    assert time.monotonic() - began < DEATH
    assert 0 not in [code for code, _, _ in found]
    assert found[own][0] == 2
    assert message in found[own][2]
    assert "Traceback" not in found[own][2]
    assert not run.exists()


def test_fewer_devices_are_used_if_their_number_does_not_divide_the_batch() -> None:
    code = "from pdrunet_jax.train.run import choose_devices as c; print(c(8)[1], c(7)[1], c(9)[1], sep='|')"
    flags = "--xla_force_host_platform_device_count=3"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "XLA_FLAGS": flags}
    )
    assert result.stdout.strip().split("|") == [
        "2 of 3 devices: more do not divide train.batch_size 8",
        "1 of 3 devices: no other number divides train.batch_size 7",
        "3 devices",
    ]
