"""Write the metrics of run folders as TensorBoard event files, next to metrics.jsonl.

pip install tensorboardX tensorboard
python examples/tensorboard.py runs/mura [runs/other ...]
tensorboard --logdir runs
"""

import json
import sys
from pathlib import Path

from tensorboardX import SummaryWriter

for folder in map(Path, sys.argv[1:]):
    for old in folder.glob("events.out.tfevents.*"):  # so that the command can be repeated
        old.unlink()
    with SummaryWriter(str(folder)) as writer:
        for line in map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()):
            numbers = {name: value for name, value in line.items() if isinstance(value, int | float) and name != "step"}
            for name, value in numbers.items():
                writer.add_scalar(name, value, line["step"])
