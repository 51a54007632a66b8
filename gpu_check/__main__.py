"""`python -m gpu_check`: compile for GPUs that are not there, and hold the programs to budgets.

It needs two wheels of JAX's own version and no driver; `make gpu-check` installs them into a folder of their own.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import tyro


@dataclasses.dataclass(frozen=True)
class Options:
    """Compile the network for GPUs that are not there, and check what the programs would do."""

    target: tuple[str, ...] = ("h100", "a100")
    """Cards, each a file in gpu_check/targets."""
    size: int = 128
    """Image size in pixels. The budgets are for the default, and for the default batch."""
    batch: int = 2
    """Images for each device."""
    only: tuple[str, ...] = ()
    """Compile only the cases whose name contains one of these."""
    every: bool = False
    """Compile all cases (6 minutes); by default those that repeat a path and a property of others are left out."""
    update: bool = False
    """Keep the figures found as the budgets, which allow 15 % more, instead of checking them; of all cases."""
    output: Path | None = None
    """JSON file for the figures; the name of the card is added to its name."""


def main() -> int:
    """Run the command; returns the exit code."""
    options = tyro.cli(Options, prog="python -m gpu_check")
    processes = []
    for target in options.target:  # side by side, since XLA compiles on one core
        output = options.output and str(options.output.with_stem(f"{options.output.stem}_{target}"))
        given = {"target": target, "size": options.size, "batch": options.batch, "only": options.only}
        text = json.dumps(given | {"every": options.every, "update": options.update, "output": output})
        command = [sys.executable, "-m", "gpu_check.check", text]
        processes.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, log = process.communicate()
        if process.returncode not in (0, 1) or "Traceback" in log:  # otherwise XLA only says that there is no driver
            print(log, file=sys.stderr)
    return max(process.returncode for process in processes)


if __name__ == "__main__":
    sys.exit(main())
