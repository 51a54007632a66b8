"""Run commands of the package with settings, as a user types them."""

import subprocess
import sys
from collections.abc import Mapping
from typing import Any


def run_command(command: str, *words: object, settings: Mapping[str, object] | None = None, output: Any = None) -> None:
    """Run `python -m pdrunet_jax.COMMAND WORDS --NAME VALUE ...`; raises `CalledProcessError` if it fails.

    Of `settings`, those that are True are given by name alone, and those that are False not at all. `output` is a file
    for standard output.
    """
    given = {name: value for name, value in (settings or {}).items() if value is not False}
    options = [word for name, value in given.items() for word in (f"--{name}", value) if word is not True]
    line = [sys.executable, "-m", f"pdrunet_jax.{command}", *map(str, (*words, *options))]
    subprocess.run(line, check=True, stdout=output)
