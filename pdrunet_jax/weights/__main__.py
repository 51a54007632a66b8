"""Command `weights`: list the weights that come with the package, print their cards, make new ones."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Union

import tyro

from pdrunet_jax.evaluate.scores import aligned
from pdrunet_jax.model.load import load_weights
from pdrunet_jax.model.shipped import FOLDER, shipped_file, shipped_names
from pdrunet_jax.runtime import cli
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.opening import read_text


@dataclass(frozen=True)
class List:
    """List the weights that come with the package."""


@dataclass(frozen=True)
class Card:
    """Print what weights were trained on, how well they do, what they are not for, and their licence."""

    name: tyro.conf.Positional[str]
    """Name of the weights."""


@dataclass(frozen=True)
class Publish:
    """Make shipped weights and their card from a finished run; for those who build the package."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    name: tyro.conf.Positional[str]
    """Name that users will give: small letters, digits and hyphens."""
    scores: tuple[tuple[str, Path], ...] = ()
    """Title and folder of each evaluation (evaluate --output FOLDER) to show on the card."""
    folder: Path = FOLDER
    """Folder to write NAME.safetensors and NAME.md to."""


def show_list() -> None:
    """Print name, classes, size and network of all weights."""
    names = shipped_names()
    if not names:
        print("no weights come with this copy of pdrunet-jax")
        return
    table = [["name", "classes", "trained at", "network", "size of file"]]
    for name in names:
        path = shipped_file(name)
        loaded = load_weights(path)
        options, size = loaded.options, " x ".join(map(str, loaded.size or ("?",)))
        network = f"{options['name']}, {options['filters']} filters"
        table.append([name, ", ".join(options["class_names"]), size, network, f"{path.stat().st_size / 1e6:.1f} MB"])
    print(aligned(table, len(table[0])))
    print(f"\nsegment images:        pdrunet predict --weights {names[0]} xray.png --output out")
    print(f"what they are for:     pdrunet weights card {names[0]}")


def show_card(name: str) -> None:
    """Print a card. Raises `UserError` if no weights have that name."""
    if name not in (names := shipped_names()):
        known = f"choose one of {', '.join(names)}" if names else "none come with this copy of pdrunet-jax"
        raise UserError(f"{name}: no weights of this name; {known}")
    card = shipped_file(name).with_suffix(".md")
    if not card.is_file():
        raise UserError(f"{card} is missing; install pdrunet-jax again")
    print(read_text(card), end="")


def main() -> None:
    """Run the subcommand on the command line; without one, list."""
    commands: Any = Union[  # noqa: UP007 - tyro needs the form
        Annotated[List, tyro.conf.subcommand("list")],
        Annotated[Card, tyro.conf.subcommand("card")],
        Annotated[Publish, tyro.conf.subcommand("publish")],
    ]
    description = "List the weights that come with the package (without a subcommand), or print what they are for."
    arguments = sys.argv[1:] or ["list"]
    options = tyro.cli(commands, prog=cli.program("weights"), description=description, args=arguments)
    if isinstance(options, Card):
        show_card(options.name)
    elif isinstance(options, Publish):
        # Only here: reads drawn X-rays' tables, and with them all that draws.
        from pdrunet_jax.weights.publish import publish

        for path in publish(options.run, options.name, options.scores, options.folder):
            print(f"written {path} ({path.stat().st_size / 1e6:.2f} MB)")
    else:
        show_list()


if __name__ == "__main__":
    cli.run(main)
