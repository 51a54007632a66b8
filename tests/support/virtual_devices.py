"""Training on parts of this CPU that JAX takes for 8 devices: `python virtual_devices.py FOLDER`.

Leaves NAME.npz in the folder for each of `RUNS`: losses, the parameters and statistics after the last step, and what
validation then says of the first batch. And `PROGRAM`, the text of a compiled training step for split rows.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pdrunet_jax import config as config_io
from pdrunet_jax.runtime import compile as compiling
from pdrunet_jax.runtime.devices import make_mesh, place_batch, replicate
from pdrunet_jax.train.step import build_model, create_state, make_eval_step, make_train_step
from tests.support import LONG

PROGRAM = "rows.txt"
PROGRAM_SIZE, PROGRAM_ROWS = 256, 4


@dataclasses.dataclass(frozen=True)
class Run:
    path: str = "fused"
    mesh: tuple[int, int] | None = None
    """(data, rows); None for a single device and no mesh."""
    steps: int = 20
    accumulate: int = 1
    remat: bool = False
    precision: str = "float64"
    size: tuple[int, int] = (16, 16)
    validated: bool = False

    @property
    def config(self) -> Any:
        settings = {
            "model": {"filters": 4, "conv": self.path},
            "train": {"steps": 20, "precision": self.precision, "remat": self.remat},
            "optim": {"accumulate": self.accumulate, "learning_rate": 0.01},
        }
        return config_io.from_dict(settings, "test")


HALF = Run(steps=3, precision="bfloat16")
ROWS = Run(accumulate=2, steps=3, size=(64, 16), validated=True)

RUNS = {
    "fused": Run(),
    "fused on 8": Run(mesh=(8, 1)),
    "bfloat16": HALF,
    "bfloat16 on 8": dataclasses.replace(HALF, mesh=(8, 1)),
    "rows": ROWS,
    "rows, rematerialised on 4 x 2": dataclasses.replace(ROWS, remat=True, mesh=(4, 2)),
}
if LONG:
    RUNS |= {"plain": Run("plain"), "plain on 8": Run("plain", mesh=(8, 1))}


def batches(steps: int, size: tuple[int, int], images: int = 16) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        {
            "image": rng.integers(0, 256, (images, *size, 1), dtype=np.uint8),
            "mask": rng.integers(0, 2, (images, *size), dtype=np.uint8),
            "index": np.arange(images, dtype=np.int32) + step * images,
            "epoch": np.zeros(images, np.int32),
        }
        for step in range(steps)
    ]


def train(run: Run) -> dict[str, Any]:
    mesh = None if run.mesh is None else make_mesh(run.mesh[1], jax.devices()[: run.mesh[0] * run.mesh[1]])
    graphdef, state = create_state(run.config, build_model(run.config, 1, mesh))
    step = make_train_step(run.config, graphdef, 1, mesh)
    data: list[Any] = list(batches(run.steps, run.size))
    if mesh is not None:
        state, data = replicate(mesh, state), [place_batch(mesh, batch) for batch in data]
    losses = []
    for batch in data:
        state, values = step(state, batch)
        losses.append(float(values["loss"]))
    scores = {}
    if run.validated:
        scores = make_eval_step(run.config, graphdef, 1, mesh)(state.params, state.stats, data[0])
    leaves = jax.tree_util.tree_leaves_with_path((state.params, state.stats))
    return {
        "losses": np.array(losses),
        **{jax.tree_util.keystr(path): np.asarray(leaf, np.float64) for path, leaf in leaves},
        **{f"validation {name}": np.asarray(value) for name, value in scores.items()},
    }


def program() -> str:
    """The training step of the usual network for one image of split rows: compiled only."""
    config = config_io.from_dict({"model": {"conv": "fused"}}, "test")
    mesh = make_mesh(PROGRAM_ROWS, jax.devices()[:PROGRAM_ROWS])
    graphdef, state = create_state(config, build_model(config, 1, mesh))
    batch = place_batch(mesh, batches(1, (PROGRAM_SIZE, PROGRAM_SIZE), images=1)[0])
    return make_train_step(config, graphdef, 1, mesh).lower(replicate(mesh, state), batch).compile().as_text()


def main(folder: Path) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_enable_x64", True)
    # The same programs without the compiler's last optimisations, which take most of its time.
    compiling.compiler_options = lambda: {"xla_backend_optimization_level": 0}
    for name, run in RUNS.items():
        np.savez(folder / f"{name}.npz", **train(run))
    (folder / PROGRAM).write_text(program())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
