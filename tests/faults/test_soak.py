"""Many checkpoints in a row: no files, descriptors or memory accumulate, and each restores exactly."""

import os
import random
from pathlib import Path

import numpy as np

from pdrunet_jax.runtime.checkpoint import Checkpoints, checkpoint_faults
from tests.support.live import LONG, record

SAVES = 500 if LONG else 15
LATEST, BEST = 2, 3


def resident() -> int:
    """Resident memory of this process in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20


def test_checkpoints_do_not_pile_up_and_each_is_what_was_saved(tmp_path: Path) -> None:
    folder, draw = tmp_path / "checkpoints", random.Random(0)
    checkpoints = Checkpoints(folder, LATEST, BEST)
    scores: dict[int, float] = {}
    memory = files = 0
    for step in range(1, SAVES + 1):
        state = {"kernel": np.random.default_rng(step).standard_normal((3, 3, 40, 40)), "count": np.int32(step)}
        scores[step] = draw.random()
        checkpoints.save(step, state, {"next_index": step}, {"sequence": str(step)}, scores[step])
        best = sorted(scores, key=lambda number: -scores[number])[:BEST]
        kept = {*best, *list(scores)[-LATEST:]}
        assert {path.name for path in folder.iterdir()} == {str(number) for number in kept}
        if step == 10:
            memory, files = resident(), len(os.listdir("/proc/self/fd"))
        if step % 10 == 0 or step == SAVES:
            assert not any(checkpoint_faults(folder / str(number)) for number in kept)
            restored = Checkpoints(folder, LATEST, BEST).restore(state)
            assert restored is not None
            assert (restored.step, restored.position, restored.val_dice) == (step, {"next_index": step}, scores[step])
            np.testing.assert_array_equal(restored.state["kernel"], state["kernel"])
    grown, opened = resident() - memory, len(os.listdir("/proc/self/fd")) - files
    assert opened <= 2
    assert grown < 100, f"{grown} MiB more after {SAVES - 10} saves"
    record("soak of checkpoints", saves=SAVES, mib_grown=grown, files_opened=opened)
