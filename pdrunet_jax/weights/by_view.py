"""Scores of drawn X-rays by bone and view, from the files of an evaluation."""

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pdrunet_jax.data.phantoms.surfaces.files import DRAWN
from pdrunet_jax.data.phantoms.surfaces.views import VIEWS
from pdrunet_jax.evaluate.scores import Statistic, read_csv, statistic
from pdrunet_jax.runtime.errors import UserError

ALL = "all views"


@dataclass(frozen=True)
class ViewScore:
    """Dice of a class in the images of a view that show it."""

    bone: str
    view: str
    """A view, or `ALL`."""
    dice: Statistic
    """The interval is for other bodies if there are at least three, else for other images of the same bodies."""
    bodies: int


def scores_by_view(evaluation: Path, data: Path) -> list[ViewScore]:
    """Dice by class and view: the rows of per_image.csv in `evaluation`, with the views of drawn.csv in `data`.

    Images in which a class is absent do not count for it. Raises `UserError` if a file cannot be read, or an image of
    one is not in the other.
    """
    rows = read_csv(evaluation / "per_image.csv")
    drawn = read_drawn(data / DRAWN)
    if missing := sorted({row.image for row in rows} - drawn.keys()):
        raise UserError(f"{data / DRAWN} has no line for {missing[0]}: {evaluation} is of other images")
    result = []
    for bone in dict.fromkeys(row.class_name for row in rows):
        own = [row for row in rows if row.class_name == bone and row.pixels_true and not math.isnan(row.dice)]
        for view in (ALL, *sorted({view for view, _ in drawn.values()}, key=_order)):
            part = [row for row in own if view in (ALL, drawn[row.image][0])]
            bodies = [drawn[row.image][1] for row in part]
            groups = bodies if len({*bodies}) >= 3 else [row.image for row in part]
            dice = statistic([row.dice for row in part], groups, bounds=(0.0, 1.0))
            result += [ViewScore(bone, view, dice, len({*bodies}))] if part else []
    return result


def table_of(scores: Iterable[ViewScore]) -> str:
    """The scores as a Markdown table: a line for each bone and view."""
    lines = ["| bone | view | Dice | 95 % interval | images | bodies |", "|---|---|---|---|---|---|"]
    for each in scores:
        dice = each.dice
        interval = "" if math.isnan(dice.low) else f"{dice.low:.3f} to {dice.high:.3f}"
        lines.append(f"| {each.bone} | {each.view} | {dice.mean:.3f} | {interval} | {dice.images} | {each.bodies} |")
    return "\n".join(lines)


def read_drawn(path: Path) -> dict[str, tuple[str, str]]:
    """View and body of each image, by its path. Raises `UserError`."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return {row["image"]: (row["view"], row["body"]) for row in csv.DictReader(file)}
    except (OSError, UnicodeDecodeError, csv.Error, KeyError) as error:
        raise UserError(f"{path}: cannot be read as the table of `data phantom --surfaces` ({error})") from None


def _order(view: str) -> int:
    """Place of a view in `VIEWS`."""
    return VIEWS.index(view) if view in VIEWS else len(VIEWS)
