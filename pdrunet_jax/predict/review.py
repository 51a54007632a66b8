"""The images that a person should look at first: those that the network is least confident of."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pdrunet_jax.data.walk import some
from pdrunet_jax.predict.outputs import CONFIDENCE, Record, keep_copy
from pdrunet_jax.runtime.cli import printable
from pdrunet_jax.runtime.files import atomic_write, csv_text, writing
from pdrunet_jax.runtime.opening import read_regular

COLUMNS = ("image", "class", "confidence")


class Doubt(NamedTuple):
    """An image, by its name in areas.csv, and the class in it that the network is least confident of."""

    confidence: float
    image: str
    label: str


def least_confident(records: Mapping[str, Record], count: int) -> list[Doubt]:
    """The `count` images with the lowest confidence, lowest first. An image has that of its least confident class.

    `records` are those of all images, by name.
    """
    doubts = []
    for name, record in records.items():
        value, label = min((value, label) for label, value in record[CONFIDENCE].items())
        doubts.append(Doubt(value, name, label))
    return sorted(doubts)[:count]


def report_review(records: Mapping[str, Record], count: int, path: Path, *, overwrite: bool = False) -> None:
    """Print the `count` least confident images, and those in which nothing was found, and write the table at `path`.

    Unless `overwrite` is set, a copy is kept of an earlier table that differs: it may hold a person's notes. Raises
    `RunError` if the table cannot be written.
    """
    doubts = least_confident(records, count)
    print(f"look at these {len(doubts)} of {len(records)} images first (confidence from 0 to 1):")
    for doubt in doubts:
        print(printable(f"{doubt.confidence:10.3f}  {doubt.image}: {doubt.label}"))
    if empty := [name for name, record in records.items() if not any(record["pixels"].values())]:
        print(printable(f"warning: nothing was found in {len(empty)} images: {some(empty)}"))
    _write(path, doubts, overwrite=overwrite)
    print(f"written to {path}")


def _write(path: Path, doubts: Sequence[Doubt], *, overwrite: bool) -> None:
    rows = ((doubt.image, doubt.label, f"{doubt.confidence:.4f}") for doubt in doubts)
    text = csv_text([COLUMNS, *rows]).encode()
    with writing(path):
        earlier = read_regular(path) if path.exists() and not overwrite else text
        if earlier != text:
            print(f"{path} differs; a copy of the earlier one is kept as {keep_copy(path, earlier)}")
        atomic_write(path, text)
