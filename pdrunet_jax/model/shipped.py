"""Weights that come with the package: their names and files."""

import os
import sys
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "weights"
"""Where they are: NAME.safetensors, and NAME.md, which says what they were trained on, how well they do and the terms
of use."""

SUFFIX = ".safetensors"


def shipped_names() -> list[str]:
    """Names of the weights that come with the package, sorted."""
    return sorted(path.stem for path in FOLDER.glob(f"*{SUFFIX}"))


def shipped_file(name: str) -> Path:
    """The file of the weights with this name."""
    return FOLDER / f"{name}{SUFFIX}"


def resolve_weights(weights: str | Path) -> Path:
    """The path that `weights` names: a path as it is, or else a name of weights that come with the package.

    A file or folder in the way comes first. Which of both was taken is said on standard error.
    """
    name, path = str(weights), Path(weights)
    if name not in shipped_names():
        return path
    if os.path.lexists(path):
        _say(f"{name}: what has this name in {Path.cwd()}, not the weights that come with pdrunet-jax")
        return path
    _say(f"{name}: the weights that come with pdrunet-jax; `pdrunet weights card {name}` tells what they are for")
    return shipped_file(name)


@cache
def _say(line: str) -> None:
    """Print a line on standard error, once."""
    print(line, file=sys.stderr)
