"""Signals at any moment, single and repeated: state saved, exit code 75, no process left, exact resume."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pdrunet_jax.runtime.devices import Placement
from pdrunet_jax.runtime.stop import SIGNALS, StopFlag
from pdrunet_jax.train.validate import validate
from tests.support.live import (
    EVAL_EVERY,
    LONG,
    Place,
    assert_same_run,
    read_until,
    record,
    resumed_at,
    steps_in,
    stream,
)

STOPS = 50 if LONG else 2
LANES = 2
CATCHES_SIGTERM = 1 << (signal.SIGTERM - 1)


def wait_for_handlers(pid: int) -> None:
    """Wait until the process handles SIGTERM, some hundredths of a second after its start."""
    status = Path(f"/proc/{pid}/status")
    end = time.monotonic() + 30
    while time.monotonic() < end:
        caught = next(line for line in status.read_text().splitlines() if line.startswith("SigCgt"))
        if int(caught.split()[1], 16) & CATCHES_SIGTERM:
            return
        time.sleep(0.005)
    raise AssertionError("no handler was installed")


def lane(place: Place, number: int, stops: int) -> dict[str, int]:
    """Stop runs at random moments until `stops` were stopped; each must end bit-equal to the undisturbed run."""
    draw = stream("signals", number)
    figures = {"stopped": 0, "signals": 0, "exit_75": 0, "without_stored_programs": 0, "runs": 0}
    while figures["stopped"] < stops:
        run, finished = place.path / f"stopped-{number}-{figures['runs']}", False
        while not finished and figures["stopped"] < stops:
            # Without stored programs XLA compiles for a long time, and the signal arrives meanwhile.
            cold = draw.random() < 0.1
            environment = {"JAX_ENABLE_COMPILATION_CACHE": "false"} if cold else {}
            with place.start(workdir=run, **environment) as process:
                wait_for_handlers(process.pid)
                time.sleep(draw.uniform(0.0, 6.0))
                sent = 0
                for _ in range(draw.choice((1, 1, 2, 3))):
                    if process.poll() is None:
                        process.send_signal(draw.choice(SIGNALS))
                        sent += 1
                        time.sleep(draw.uniform(0.0, 0.3))
                out, err = process.communicate(timeout=120)
            finished = "\ntest dice" in out
            assert err == ""
            assert process.returncode == 75 or (finished and process.returncode == 0), (process.returncode, out)
            if process.returncode == 75:
                figures["stopped"] += 1
                figures["exit_75"] += 1
                figures["signals"] += sent
                figures["without_stored_programs"] += cold
        if not finished:
            result = place.train(workdir=run)
            assert (result.returncode, result.stderr) == (0, "")
        assert_same_run(run, place.undisturbed)
        figures["runs"] += 1
    return figures


def test_asked_to_stop_at_any_moment_it_exits_with_75_leaves_nothing_running_and_resumes_exactly(place: Place) -> None:
    began = time.monotonic()
    with ThreadPoolExecutor(LANES) as pool:
        lanes = list(pool.map(lambda number: lane(place, number, STOPS // LANES), range(LANES)))
    assert place.left_behind() == []
    total = {name: sum(each[name] for each in lanes) for name in lanes[0]}
    assert total["exit_75"] == total["stopped"] == STOPS
    record("signals", seconds=round(time.monotonic() - began), **total)


@pytest.mark.stress
def test_asked_to_stop_while_it_compiles_it_saves_at_the_next_step(place: Place) -> None:
    run = place.path / "stopped-compiling"
    with place.start(workdir=run, JAX_ENABLE_COMPILATION_CACHE="false") as process:
        end = time.monotonic() + 60
        while not (run / "config.toml").exists():  # written just before the training step is compiled
            assert time.monotonic() < end
            time.sleep(0.02)
        time.sleep(3)
        assert not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_bytes()
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (75, "")
    assert steps_in(out, r"asked to stop \(SIG\w+\): saved at step (\d+)")[0] <= 1
    result = place.train(workdir=run)
    assert (result.returncode, result.stderr) == (0, "")
    assert_same_run(run, place.undisturbed)


@pytest.mark.stress
def test_asked_to_stop_before_a_validation_it_saves_and_the_resumed_run_validates(place: Place) -> None:
    run = place.path / "before-validation"
    with place.start(workdir=run) as process:
        assert read_until(process, EVAL_EVERY, [])
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (75, "")
    assert steps_in(out, r"asked to stop \(SIG\w+\): saved at step (\d+)")[0] >= EVAL_EVERY
    result = place.train(workdir=run)
    assert result.returncode == 0, result.stderr
    assert resumed_at(result.stdout) >= EVAL_EVERY
    assert_same_run(run, place.undisturbed)


def test_a_validation_ends_when_the_program_is_asked_to_stop() -> None:
    def eval_step(*_: object) -> object:
        raise AssertionError("another batch was scored")

    with StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        batches = [{"image": np.zeros((1, 2, 2, 1), np.uint8)}]
        scored = validate(eval_step, {}, {}, batches, names=("a",), cases=0, soft=False, place=Placement(), stop=stop)
        assert scored is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_signal_to_the_whole_group_leaves_no_service_of_wandb_behind(place: Place, number: signal.Signals) -> None:
    """Ctrl-C in a terminal reaches every process; SIGKILL leaves W&B's service without its parent."""
    run = place.path / f"group-{number.name}"
    with place.start("--tracking.wandb", "offline", workdir=run) as process:
        assert read_until(process, 2, [])
        assert len(place.left_behind(0)) >= 2  # the trainer and W&B's service
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (75 if number == signal.SIGINT else -signal.SIGKILL, "")
    assert place.left_behind(20) == []


def test_signals_after_the_work_are_ignored() -> None:
    earlier = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with StopFlag(last=True):
            pass
        for number in SIGNALS:
            os.kill(os.getpid(), number)  # would end the process
            assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
