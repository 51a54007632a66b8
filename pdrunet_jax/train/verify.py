"""Integrity check of a run folder: configuration, checkpoints, best weights, metrics."""

from collections.abc import Callable, Iterator
from pathlib import Path

from pdrunet_jax import config
from pdrunet_jax.model.folds import started_folds
from pdrunet_jax.model.load import load_weights
from pdrunet_jax.runtime.checkpoint import checkpoint_faults, checkpoint_steps
from pdrunet_jax.runtime.errors import RunError, UserError
from pdrunet_jax.runtime.run_folder import RunFolder, read_entries

Finding = tuple[str, str]
"""Name of a file or checkpoint, and its fault; an empty fault if it is intact."""


def verify(path: Path) -> int:
    """Print one line for each checkpoint and file of the run folder `path`; return 0 if all are intact.

    In a folder of folds, every fold is checked. Nothing is changed.

    Raises:
        UserError: `path` is not a run folder.
        RunError: something is damaged; the message lists every fault.
    """
    run = RunFolder(path)
    folds = started_folds(path).values()
    if not folds and not (run.config_file.exists() or run.checkpoints.is_dir()):
        raise UserError(f"--verify {path}: not a run folder; it has neither config.toml nor checkpoints/")
    bad = []
    every = ((each.path / name, fault) for each in folds or [run] for name, fault in findings(each))
    for file, fault in every:
        name = file.relative_to(path).as_posix()
        print(f"{name}: {f'DAMAGED, {fault}' if fault else 'intact'}", flush=True)
        if fault:
            bad.append(f"{file}: {fault}")
    if bad:
        listing = "".join(f"\n  - {line}" for line in bad)
        raise RunError(
            f"{len(bad)} fault{'s' if len(bad) > 1 else ''} in {path}:{listing}\n"
            "Resumed training starts from the newest intact checkpoint and sets damaged ones aside."
        )
    print(f"{path} is intact")
    return 0


def findings(run: RunFolder) -> Iterator[Finding]:
    """Check every part of a run folder, one finding each."""
    settings = _file(run.config_file, config.read)
    yield settings
    steps = checkpoint_steps(run.checkpoints)
    for step in steps:
        path = run.checkpoints / str(step)
        fault = "; ".join(checkpoint_faults(path))
        if not fault and not settings[1]:
            fault = _file(path, load_weights)[1]
        yield f"checkpoints/{step}", fault
    if not steps:
        yield "checkpoints", "there is none"
    if run.best.exists():
        yield _file(run.best, load_weights)
    if run.metrics.exists():
        bad = [str(number) for number, entry in enumerate(read_entries(run.metrics), 1) if entry is None]
        yield run.metrics.name, f"no JSON object with a step in line {', '.join(bad)}" if bad else ""


def _file(path: Path, read: Callable[[Path], object]) -> Finding:
    try:
        read(path)
    except UserError as error:
        return path.name, " ".join(str(error).removeprefix(f"{path}: ").removeprefix(f"{path} ").split())
    return path.name, ""
