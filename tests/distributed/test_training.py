"""Training by several processes and devices: the run of one, whatever happens to them."""

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
    ends,
    free_port,
    state_of,
    steps_of,
    wait_for,
)

DEATH = 60
"""Seconds within which all processes end when one of them has died."""


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.stress)])
def test_processes_that_are_stopped_and_killed_make_the_run_of_one(site: Site, count: int) -> None:
    run = site.path / f"by-{count}"

    with site.train_together(run, count) as processes:
        wait_for(run, 2, processes)
        processes[-1].send_signal(signal.SIGTERM)
        stopped = ends(processes)
    assert [code for code, _, _ in stopped] == [75] * count
    step = int(re.findall(r"asked to stop \(SIGTERM\): saved at step (\d+)", stopped[0][1])[0])
    assert step == steps_of(run)[-1] < STEPS
    assert "step 1/" not in stopped[1][1]  # only the first one speaks
    assert "validation" not in stopped[1][1]

    with site.train_together(run, count) as processes:
        wait_for(run, 12, processes)
        began = time.monotonic()
        processes[-1].kill()
        killed = ends(processes)
        assert time.monotonic() - began < DEATH
    assert f"resumed {run} at step {step}" in killed[0][1]
    assert all(code > 0 and "another process has ended" in err for code, _, err in killed[:-1])
    assert all("Traceback" not in err for _, _, err in killed)

    elsewhere = shutil.copytree(run, site.path / f"by-{count}-then-8-devices")
    with site.train_together(run, count) as processes:
        finished = ends(processes)
    assert [(code, err) for code, _, err in finished] == [(0, "")] * count
    assert f"resumed {run} at step 10" in finished[0][1]
    assert_close_runs(run, site.alone)

    [(code, out, err)] = ends([site.train(elsewhere, devices=8)])
    assert (code, err) == (0, "")
    assert "8 devices" in out.splitlines()[0]
    assert f"resumed {elsewhere} at step 10" in out
    assert_close_runs(elsewhere, site.alone)


@pytest.mark.stress
@pytest.mark.parametrize("victim", [0, 1, 3])
def test_a_run_whose_process_was_killed_ends_as_an_undisturbed_one_bit_for_bit(site: Site, victim: int) -> None:
    undisturbed, run = site.path / "undisturbed-by-4", site.path / f"killed-{victim}"
    if not undisturbed.exists():
        with site.train_together(undisturbed, 4) as processes:
            assert [code for code, _, _ in ends(processes)] == [0] * 4
    with site.train_together(run, 4) as processes:
        wait_for(run, SAVE_EVERY + 2, processes)
        began = time.monotonic()
        processes[victim].kill()
        codes = [code for code, _, _ in ends(processes)]
        assert time.monotonic() - began < DEATH
    assert 0 not in codes
    with site.train_together(run, 4) as processes:
        assert [code for code, _, _ in ends(processes)] == [0] * 4
    a, b = state_of(run), state_of(undisturbed)
    assert [name for name in b if a[name].tobytes() != b[name].tobytes()] == []


@pytest.mark.stress
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_a_run_saved_on_4_devices_goes_on_on_another_number(site: Site, devices: int) -> None:
    saved, run = site.path / "on-4", site.path / f"on-4-then-{devices}"
    if not saved.exists():
        with site.train(saved, devices=4) as process:
            wait_for(saved, SAVE_EVERY + 1, [process])
            process.kill()
            process.communicate()
    shutil.copytree(saved, run)
    [(code, out, err)] = ends([site.train(run, devices=devices)])
    assert (code, err) == (0, "")
    assert f"resumed {run} at step " in out
    assert_close_runs(run, site.alone)


def test_a_process_with_other_settings_ends_all_with_the_difference(site: Site) -> None:
    address = f"127.0.0.1:{free_port()}"
    common = ["--distributed.coordinator", address, "--distributed.processes", 2, "--distributed.timeout", 120]
    run = site.path / "unlike"
    first = site.train(run, *common, "--distributed.index", 0)
    second = site.train(run, *common, "--distributed.index", 1, "--seed", 4)
    (code, _, err), (other_code, _, other_err) = ends([first, second])
    assert other_code == 2
    assert "process 1 has other settings than the first one" in other_err
    assert "seed: 3 -> 4" in other_err
    assert code == 1
    assert err.startswith("error: process 0 ends: process 1 of 2 on ")
    assert "seed: 3 -> 4" in err
    assert not run.exists()


def test_of_devices_that_do_not_divide_the_batch_fewer_are_used_and_it_is_said() -> None:
    code = (
        "from pdrunet_jax.train.run import choose_devices as c; print(c(8, 32)[1], c(7, 32)[1], c(9, 32)[1], sep='|')"
    )
    flags = "--xla_force_host_platform_device_count=3"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "XLA_FLAGS": flags}
    )
    assert result.stdout.strip().split("|") == [
        "2 of 3 devices: more do not divide train.batch_size 8",
        "1 of 3 devices: no other number divides train.batch_size 7",
        "3 devices",
    ]


def test_a_signal_ends_the_waiting_for_the_other_processes(site: Site) -> None:
    options = ["--distributed.coordinator", f"127.0.0.1:{free_port()}", "--distributed.processes", 2]
    process = site.train(site.path / "waiting", *options, "--distributed.index", 0)
    time.sleep(6)  # until it waits; an earlier signal ends it likewise
    process.send_signal(signal.SIGTERM)
    [(code, out, err)] = ends([process], timeout=60)
    assert (code, out, err) == (75, "", "")


def test_a_coordinator_that_does_not_answer_is_named(site: Site) -> None:
    options = ["--distributed.coordinator", "127.0.0.1:9", "--distributed.processes", 2, "--distributed.index", 1]
    [(code, _, err)] = ends([site.train(site.path / "lost", *options, "--distributed.timeout", 2)], timeout=60)
    assert code == 2
    assert re.fullmatch(
        r"error: process 1 of 2: .* 2 s: --distributed.coordinator 127.0.0.1:9 does not answer.*\n", err
    )


def test_without_a_cluster_the_options_that_are_needed_are_named(site: Site) -> None:
    [(code, _, err)] = ends([site.train(site.path / "nowhere", "--distributed")])
    assert code == 2
    assert "JAX finds no cluster here" in err
    assert "--distributed.coordinator HOST:PORT --distributed.processes N --distributed.index I" in err
    assert not Path(site.path / "nowhere").exists()
