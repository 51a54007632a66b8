"""A loss that is not finite stops the run before the update and names the samples of the batch."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from pdrunet_jax.model.load import load_model
from tests.support.live import Place, resumed_at


def state_of(checkpoint: Path) -> dict[str, Any]:
    with ocp.PyTreeCheckpointer() as checkpointer:
        state: dict[str, Any] = checkpointer.restore(checkpoint / "state")
    return state


def test_a_loss_that_is_not_finite_stops_the_run_and_the_state_before_it_is_a_checkpoint(place: Place) -> None:
    run = place.path / "diverged"
    options = ("--optim.learning-rate", "1e30", "--train.save-every", "30", "--train.log-every", "5")
    result = place.train(*options, workdir=run)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    report = json.loads((run / "not_finite.json").read_text())
    assert f"the loss or a gradient of step {report['step']} is not finite" in result.stderr
    assert len(report["samples"]) == 2
    assert all((place.path / "data" / sample).is_file() for sample in report["samples"])
    good = max(int(path.name) for path in (run / "checkpoints").iterdir())
    assert good == report["step"] - 1
    state = state_of(run / "checkpoints" / str(good))
    assert (int(state["step"]), bool(state["diverged"])) == (good, False)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert load_model(run, which="latest").outputs == 1
    again = place.train(*options, workdir=run)  # from that checkpoint, to the same end
    assert resumed_at(again.stdout) == good
    assert again.stderr == result.stderr
    assert json.loads((run / "not_finite.json").read_text()) == report
