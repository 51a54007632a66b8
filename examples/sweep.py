"""Train every combination of a W&B sweep file one after the other, without a W&B server, and list the results.

python examples/sweep.py [SWEEP.yaml] [--option value ...]

Further options go to every training. Runs are tracked offline; `wandb sync runs/sweep/*/wandb/offline-run-*` uploads
them. Started again, the script goes on: finished trainings are only scored again.
"""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import yaml


def main() -> int:
    """Train and list; returns the exit code of the first training that fails."""
    file, *options = sys.argv[1:] or ["examples/sweep.yaml"]
    grid = yaml.safe_load(Path(file).read_text(encoding="utf-8"))["parameters"]
    values = [each.get("values", [each.get("value")]) for each in grid.values()]
    results = []
    for combination in itertools.product(*values):
        settings = [f"--{name}={value}" for name, value in zip(grid, combination, strict=True)]
        name = "_".join(str(value) for value, each in zip(combination, values, strict=True) if len(each) > 1)
        folder = Path("runs/sweep") / name
        command = [sys.executable, "-m", "pdrunet_jax.train", "--config", "phantom", "--workdir", str(folder)]
        code = subprocess.run([*command, "--tracking.wandb=offline", *settings, *options], check=False).returncode
        if code:
            return code
        lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        results.append((max(line["val/dice"] for line in lines if "val/dice" in line), folder))
    for dice, folder in sorted(results, reverse=True):
        print(f"{dice:.4f}  {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
