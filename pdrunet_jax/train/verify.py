"""Whether a run folder is whole: every checkpoint against its digests, the weights, the metrics, the configuration."""

import json
from collections.abc import Iterator
from pathlib import Path

from pdrunet_jax import config as config_io
from pdrunet_jax.runtime.errors import RunError, UserError
from pdrunet_jax.runtime.run_folder import RunFolder

Finding = tuple[str, str]
"""A file or checkpoint, and what is wrong with it; empty if nothing is."""


def verify(path: Path) -> int:
    """Print a line for each checkpoint and file of the run folder `path`; returns 0 if all are whole.

    Nothing is changed. Raises `UserError` if it is no run folder, `RunError` that names everything that is damaged.
    """
    run = RunFolder(path)
    if not (run.config.exists() or run.checkpoints.is_dir()):
        raise UserError(f"--verify {path}: no run folder; it has neither config.toml nor checkpoints/")
    bad = []
    for name, fault in findings(run):
        print(f"{name}: {f'DAMAGED, {fault}' if fault else 'intact'}", flush=True)
        if fault:
            bad.append(f"{path / name}: {fault}")
    if bad:
        listing = "".join(f"\n  - {line}" for line in bad)
        raise RunError(
            f"{len(bad)} faults in {path}:{listing}\n"
            "Training resumes from the newest intact checkpoint, and sets damaged ones aside."
        )
    print(f"{path} is whole")
    return 0


def findings(run: RunFolder) -> Iterator[Finding]:
    """Every part of a run folder with what is wrong with it, a line each."""
    yield from _configuration(run)
    yield from _checkpoints(run)
    yield from _best(run)
    yield from _metrics(run)


def _configuration(run: RunFolder) -> Iterator[Finding]:
    try:
        config_io.read(run.config)
    except UserError as error:
        yield run.config.name, _one_line(error)
    else:
        yield run.config.name, ""


def _checkpoints(run: RunFolder) -> Iterator[Finding]:
    from pdrunet_jax.runtime.checkpoint import checkpoint_faults, checkpoint_steps

    steps = checkpoint_steps(run.checkpoints)
    for step in steps:
        faults = checkpoint_faults(run.checkpoints / str(step))
        yield f"checkpoints/{step}", "; ".join(faults)
    if not steps:
        yield "checkpoints", "there is none"


def _best(run: RunFolder) -> Iterator[Finding]:
    if not run.best.exists():
        return
    from pdrunet_jax.model.load import load_weights

    try:
        load_weights(run.best)
    except UserError as error:
        yield run.best.name, _one_line(error)
    else:
        yield run.best.name, ""


def _metrics(run: RunFolder) -> Iterator[Finding]:
    if not run.metrics.exists():
        return
    lines = run.metrics.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):  # of a process that was killed; dropped when the run is resumed
        lines.pop()
    bad = [str(number) for number, line in enumerate(lines, 1) if not _is_entry(line)]
    yield run.metrics.name, f"no JSON object with a step in line {', '.join(bad)}" if bad else ""


def _is_entry(line: bytes) -> bool:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(entry, dict) and isinstance(entry.get("step"), int)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
