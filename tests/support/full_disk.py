"""Run by the tests in a mount namespace of its own: a run folder on small file systems, one of which fills up.

python full_disk.py PLACE KIND: trains, fills up what KIND writes to once there is something to lose, waits for the end,
makes room again, and resumes. Prints what it saw as JSON and leaves the finished run at PLACE/KIND, off the small file
system.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

TRIGGER = "step 14/"  # after the first validation has written its weights and its checkpoint
ROOM = {"checkpoint": 0, "metrics": 0, "weights": 16 << 10, "report": 96 << 10, "read-only": 0}
"""Bytes that are left free: enough for what is written before."""


def mount(path: Path, *options: str) -> None:
    path.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(path)], check=True)


def fill(folder: Path, room: int) -> Path:
    """Take all space of a file system but `room`."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    os.truncate(ballast, ballast.stat().st_size - room)
    return ballast


def train(place: Path, run: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "pdrunet_jax.train", "--config", "tiny.toml", "--workdir", str(run)]
    return subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def digests(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and "tmp-" not in str(path)}


def main(place: Path, kind: str) -> None:
    run = place / f"small-{kind}"
    mount(run, "-o", "size=8m")
    mount(run / "checkpoints", "-o", "size=8m")
    mount(run / "evaluation", "-o", "size=8m")
    full = run / "checkpoints" if kind == "checkpoint" else run
    ballast = None
    with train(place, run) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(TRIGGER):
                if kind == "read-only":
                    process.kill()
                else:
                    ballast = fill(full, ROOM[kind])
        failed = process.wait(), process.stderr.read() if process.stderr else ""
    if kind == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", str(run)], check=True)
        with train(place, run) as process:
            _, err = process.communicate()
            failed = process.returncode, err
    best, checkpoints = (run / "best.safetensors").read_bytes(), digests(run / "checkpoints")
    with train(place, run) as process:  # with the disk as it is
        _, again = process.communicate()
    kept = (
        best == (run / "best.safetensors").read_bytes() and digests(run / "checkpoints").items() >= checkpoints.items()
    )
    verified = subprocess.run(
        [sys.executable, "-m", "pdrunet_jax.train", "--verify", str(run)], cwd=place, capture_output=True, text=True
    )
    if ballast is None:
        subprocess.run(["mount", "-o", "remount,rw", str(run)], check=True)
    else:
        ballast.unlink()
    with train(place, run) as process:
        _, err = process.communicate()
    shutil.copytree(run, place / f"after-{kind}")
    print(
        json.dumps(
            {
                "failed": failed,
                "again": again,
                "kept": kept,
                "verified": verified.returncode,
                "resumed": [process.returncode, err],
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
