"""Prove a port: `python -m parity_tests.support.prove MODULE:PAIR`.

Compares a Flax module with its PyTorch original level by level, from the names to a training that changes frameworks,
and stops at the first level that fails, with the likely cause. Ends with the error budget.
"""

import dataclasses
import importlib
from collections.abc import Sequence
from typing import Annotated

import jax
import tyro

from parity_tests.support import harness, torch_side
from parity_tests.support.budget import Budget
from parity_tests.support.pair import Pair
from pdrunet_jax.runtime import cli
from pdrunet_jax.runtime.errors import RunError, UserError


@dataclasses.dataclass(frozen=True)
class Options:
    """Compare a Flax module with its PyTorch original, level by level."""

    pair: Annotated[str, tyro.conf.Positional]
    """Where the pair is: a module and the name in it of what `parity_tests.support.pair.port` returned, module:NAME."""
    steps: int = harness.STEPS
    """Training steps of levels 8 and 9, 2 or more."""
    walk: bool = False
    """Print the difference of every activation first."""


def find(place: str) -> Pair:
    """Return the pair at module:NAME; raises UserError if there is none."""
    module, _, name = place.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{place}: {error}; give a module and a name in it, as in my_port.pair:PAIR") from None
    if not isinstance(found, Pair):
        raise UserError(f"{place} is {type(found).__name__}, not a pair; make it with parity_tests.support.pair.port")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; raise `RunError` at the first level that fails."""
    options = tyro.cli(Options, args=arguments, prog="python -m parity_tests.support.prove")
    if options.steps < 2:
        raise UserError(f"--steps {options.steps}: a training that changes frameworks has 2 steps or more")
    pair, budget = find(options.pair), Budget(ours=False)
    torch_side.exact()
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        try:
            if options.walk:
                for train in (False, True):
                    print(f"{pair}, {'training' if train else 'evaluation'}: relative difference")
                    for name, error in harness.walk(pair, train).items():
                        print(f"  {name:30} {error:8.1e}")
            harness.prove(pair, budget, print, options.steps)
        except AssertionError as error:
            raise RunError(str(error)) from None
    print("", *budget.lines(), sep="\n")


if __name__ == "__main__":
    cli.run(main)
