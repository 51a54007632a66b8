"""SIGKILL at any moment: during start, compilation, training, validation, saving, restoring and reporting."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support.live import (
    LONG,
    SAVE_EVERY,
    STEPS,
    Place,
    assert_same_run,
    done,
    read_until,
    record,
    resumed_at,
    stream,
)

KILLS = 200 if LONG else 4
LANES = 2
"""Number of runs killed in parallel; the moments do not depend on it."""


def kill_once(place: Place, run: Path, kind: str, delay: float) -> tuple[bool, str]:
    """Start the trainer and kill it. Returns whether it was still running, and its output."""
    seen: list[str] = []
    before = done(run)
    with place.start(workdir=run) as process:
        if kind == "save":  # around the save of the next checkpoint but one
            read_until(process, before // SAVE_EVERY * SAVE_EVERY + 2 * SAVE_EVERY, seen)
        if kind == "end":
            read_until(process, STEPS, seen)
        time.sleep(delay)
        killed = process.poll() is None
        process.kill()
        out, err = process.communicate()
        assert killed or process.returncode == 0, err
    # No half checkpoint under a checkpoint's name, no traceback.
    assert err == ""
    return killed, "".join(seen) + out


def lane(place: Place, number: int, kills: int) -> dict[str, int]:
    """Start runs until `kills` were killed; each must end bit-equal to the undisturbed run."""
    draw = stream("kills", number)
    figures = {"kills": 0, "runs": 0, "most_steps_repeated": 0, "kills_before_the_first_step": 0}
    while figures["kills"] < kills:
        run = place.path / f"killed-{number}-{figures['runs']}"
        finished = False
        while not finished and figures["kills"] < kills:
            kind = draw.choice(("any", "any", "save", "save", "end"))
            before = done(run)
            killed, out = kill_once(place, run, kind, draw.uniform(0.0, 8.0 if kind == "any" else 0.5))
            finished = not killed
            figures["kills"] += killed
            figures["kills_before_the_first_step"] += "step " not in out
            if "step " in out:
                figures["most_steps_repeated"] = max(figures["most_steps_repeated"], before - resumed_at(out))
        if not finished:
            before, result = done(run), place.train(workdir=run)
            assert (result.returncode, result.stderr) == (0, "")
            figures["most_steps_repeated"] = max(figures["most_steps_repeated"], before - resumed_at(result.stdout))
        assert_same_run(run, place.undisturbed)
        figures["runs"] += 1
    return figures


def test_runs_killed_at_any_moment_end_bit_equal_to_one_that_was_left_alone(place: Place) -> None:
    began = time.monotonic()
    with ThreadPoolExecutor(LANES) as pool:
        lanes = list(pool.map(lambda number: lane(place, number, KILLS // LANES), range(LANES)))
    total = {name: sum(each[name] for each in lanes) for name in lanes[0]}
    total["most_steps_repeated"] = max(each["most_steps_repeated"] for each in lanes)
    assert total["kills"] == KILLS
    assert total["most_steps_repeated"] <= SAVE_EVERY
    record("kills", save_every=SAVE_EVERY, seconds=round(time.monotonic() - began), **total)
