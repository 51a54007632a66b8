"""Train on 8 virtual devices of this CPU: `python virtual_devices.py FOLDER`.

Writes NAME.npz for each of `RUNS` (losses, parameters and statistics after the last step, validation scores of the
first batch) and NAME.txt, the text of the compiled training step.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pdrunet_jax.config import Config, from_dict
from pdrunet_jax.runtime import compile as compilation
from pdrunet_jax.runtime.devices import Placement, make_mesh
from pdrunet_jax.train.step import build_model, create_state, make_eval_step, make_train_step
from tests.support import LONG

IMAGES, SIZE, FILTERS = 16, 16, 4
STEPS = 20 if LONG else 5


@dataclasses.dataclass(frozen=True)
class Run:
    path: str = "fused"
    devices: int = 1
    steps: int = STEPS
    accumulate: int = 1
    remat: bool = False
    precision: str = "float64"

    @property
    def config(self) -> Config:
        settings = {
            "model": {"filters": FILTERS, "conv": self.path},
            "train": {"steps": 20, "precision": self.precision, "remat": self.remat},
            "optim": {"accumulate": self.accumulate, "learning_rate": 0.01},
        }
        return from_dict(settings, "test")


ACCUMULATED = Run(accumulate=2, steps=3)
HALF = Run(steps=3, precision="bfloat16")

RUNS = {"fused": Run(), "fused on 8": Run(devices=8)}
if LONG:
    RUNS |= {
        "accumulated": ACCUMULATED,
        "accumulated, rematerialised on 4": dataclasses.replace(ACCUMULATED, remat=True, devices=4),
        "plain": Run("plain"),
        "plain on 8": Run("plain", devices=8),
        "bfloat16": HALF,
        "bfloat16 on 8": dataclasses.replace(HALF, devices=8),
    }


def batches(steps: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        {
            "image": rng.integers(0, 256, (IMAGES, SIZE, SIZE, 1), dtype=np.uint8),
            "mask": rng.integers(0, 2, (IMAGES, SIZE, SIZE), dtype=np.uint8),
            "index": np.arange(IMAGES, dtype=np.int32) + step * IMAGES,
            "epoch": np.zeros(IMAGES, np.int32),
        }
        for step in range(steps)
    ]


def train(run: Run) -> tuple[dict[str, Any], str]:
    place = Placement(make_mesh(jax.devices()[: run.devices]) if run.devices > 1 else None)
    graphdef, state = create_state(run.config, build_model(run.config, 1))
    state = place.replicate(state)
    data = [place.shard_batch(batch) for batch in batches(run.steps)]
    step = make_train_step(run.config, graphdef, 1, place.mesh).lower(state, data[0]).compile()
    losses = []
    for batch in data:
        state, values = step(state, batch)
        losses.append(float(values["loss"]))
    scores = make_eval_step(run.config, graphdef, 1, place.mesh)(state.params, state.stats, data[0])
    leaves = jax.tree_util.tree_leaves_with_path((state.params, state.stats))
    arrays = {
        "losses": np.array(losses),
        **{jax.tree_util.keystr(path): np.asarray(leaf, np.float64) for path, leaf in leaves},
        **{f"validation {name}": np.asarray(value) for name, value in scores.items()},
    }
    return arrays, step.as_text()


def main(folder: Path) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_enable_x64", True)
    # The same programs without the compiler's last optimisations, which take most of its time.
    compilation.compiler_options = lambda: {"xla_backend_optimization_level": 0}
    for name, run in RUNS.items():
        arrays, program = train(run)
        np.savez(folder / f"{name}.npz", **arrays)
        (folder / f"{name}.txt").write_text(program)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
