"""A training run on small file systems, one of which fills up. Started by test_disk.py in a mount namespace of its own.

`python full_disk.py PLACE KIND...` trains, fills the file system that KIND writes to after the first checkpoints, waits
for the end, makes room, and resumes: for each KIND in turn. It prints observations as JSON and copies the finished run
to PLACE/after-KIND.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

TRIGGER = "step 14/"  # after the first validation has written its weights and its checkpoint
ROOM = {"checkpoint": 0, "metrics": 0, "weights": 16 << 10, "report": 96 << 10, "read-only": 0}
"""Bytes left free, enough for everything written earlier."""


def mount(path: Path, *options: str) -> None:
    path.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(path)], check=True)


def fill(folder: Path, room: int) -> Path:
    """Fill a file system up to `room` bytes."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    os.truncate(ballast, ballast.stat().st_size - room)
    return ballast


def pad(metrics: Path, process: "subprocess.Popen[str]") -> None:
    """Stop the process, and fill the last block of its metrics: the next line needs another one."""
    process.send_signal(signal.SIGSTOP)
    time.sleep(0.2)
    # Resuming drops the line, since its step is later than that of any checkpoint.
    entry = b'{"step": 1000000, "pad": ""}\n'
    missing = -(metrics.stat().st_size + len(entry)) % 4096
    with metrics.open("ab") as file:
        file.write(entry.replace(b'""', b'"' + b"x" * missing + b'"'))


def train(place: Path, run: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "pdrunet_jax.train", "--config", "tiny.toml", "--workdir", str(run)]
    return subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def digests(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and "tmp-" not in str(path)}


def break_down(place: Path, run: Path, kind: str) -> tuple[int | None, str, Path | None]:
    """Train until `kind` cannot be written. Returns exit code, message, and the file that fills the disk, if any."""
    full = run / "checkpoints" if kind == "checkpoint" else run
    ballast = None
    with train(place, run) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if line.startswith(TRIGGER):
                if kind == "read-only":
                    process.kill()
                else:
                    if kind == "metrics":
                        pad(run / "metrics.jsonl", process)
                    ballast = fill(full, ROOM[kind])
                    process.send_signal(signal.SIGCONT)
        err = process.stderr.read()
    if kind == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", str(run)], check=True)
        with train(place, run) as process:
            _, err = process.communicate()
    return process.returncode, err, ballast


def main(place: Path, kinds: list[str]) -> None:
    run = place / f"small-{'-'.join(kinds)}"
    mount(run, "-o", "size=8m")
    mount(run / "checkpoints", "-o", "size=8m")
    mount(run / "evaluation", "-o", "size=8m")
    failed = {}
    for kind in kinds:
        *failed[kind], ballast = break_down(place, run, kind)
        if kind == kinds[-1]:
            best, checkpoints = (run / "best.safetensors").read_bytes(), digests(run / "checkpoints")
            with train(place, run) as process:  # with the disk as it is
                _, again = process.communicate()
            kept = best == (run / "best.safetensors").read_bytes()
            kept = kept and digests(run / "checkpoints").items() >= checkpoints.items()
            command = [sys.executable, "-m", "pdrunet_jax.train", "--verify", str(run)]
            verified = subprocess.run(command, cwd=place, capture_output=True, text=True)
        if ballast is None:
            subprocess.run(["mount", "-o", "remount,rw", str(run)], check=True)
        else:
            ballast.unlink()
    with train(place, run) as process:
        _, err = process.communicate()
    shutil.copytree(run, place / run.name.replace("small", "after"))
    seen = {"failed": failed, "again": again, "kept": kept, "verified": verified.returncode}
    print(json.dumps(seen | {"resumed": [process.returncode, err]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
