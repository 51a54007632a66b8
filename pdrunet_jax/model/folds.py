"""Folder of folds: the runs of a cross-validation, `fold_1`, `fold_2`, ... in one folder."""

import re
from pathlib import Path

from pdrunet_jax import config
from pdrunet_jax.config import MAY_CHANGE, OF_THE_END, Config
from pdrunet_jax.runtime.errors import DataError, UserError
from pdrunet_jax.runtime.run_folder import RunFolder

MAY_DIFFER = ("data.fold", *(name for name in MAY_CHANGE if name not in OF_THE_END))
"""Settings in which the runs of a cross-validation may differ."""


def fold_folder(folder: Path, number: int) -> RunFolder:
    """The run folder of a fold, from 1, in the folder of all of them."""
    return RunFolder(folder / f"fold_{number}")


def started_folds(folder: str | Path) -> dict[int, RunFolder]:
    """The runs in a folder of folds by number, in order, as far as they were started; empty if it is none."""
    path = Path(folder)
    if (path / "config.toml").is_file():  # a run of its own
        return {}
    names = (re.fullmatch(r"fold_([1-9]\d{0,3})", each.parent.name) for each in path.glob("fold_*/config.toml"))
    return {number: fold_folder(path, number) for number in sorted(int(match[1]) for match in names if match)}


def find_folds(folder: str | Path) -> tuple[RunFolder, ...]:
    """The runs of all folds in `folder`, in order; none if it is not a folder of folds.

    Raises `UserError` that names the folds that are missing, and `DataError` that names those of another training.
    """
    runs = started_folds(folder)
    if not runs:
        return ()
    first = config.read(next(iter(runs.values())).config_file)
    count = first.data.fold_of[1] if first.data.fold_of else len(runs)
    require_alike(runs, first, count)
    if missing := [str(number) for number in range(1, count + 1) if number not in runs]:
        raise UserError(
            f"{folder} has {len(runs)} of {count} folds; missing: {', '.join(missing)}. Go on with `train --folds "
            f"{count}`, or name the weights of one fold, as in {next(iter(runs.values())).path}"
        )
    return tuple(runs.values())


def require_alike(runs: dict[int, RunFolder], settings: Config, count: int, ignore: tuple[str, ...] = ()) -> None:
    """Raise `DataError` that names the runs that are not one of `count` folds, or were trained with other settings.

    Settings to `ignore` may differ, besides `MAY_DIFFER`.
    """
    problems: list[str] = []
    for number, run in runs.items():
        other = config.read(run.config_file)
        if other.data.fold != f"{number}/{count}":
            problems.append(f"{run.path}: data.fold is {other.data.fold}, not {number}/{count}")
        problems += [f"{run.path}: {line}" for line in config.diff(other, settings, ignore=(*MAY_DIFFER, *ignore))]
    if problems:
        parent = next(iter(runs.values())).path.parent
        remedy = "train those folds again in another folder, or give the settings that all had"
        raise DataError(f"the folds in {parent} are not of one training; {remedy}", problems)
