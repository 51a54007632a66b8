"""Scores of drawn X-rays by bone and view, from the files of an evaluation."""

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pdrunet_jax.data.phantoms.surfaces.files import DRAWN
from pdrunet_jax.data.phantoms.surfaces.views import VIEWS
from pdrunet_jax.evaluate.scores import ImageScores, Statistic, read_csv, statistic
from pdrunet_jax.runtime.errors import UserError

ALL = "all views"


@dataclass(frozen=True)
class ViewScore:
    """Dice of a class in the images of a view that show it."""

    bone: str
    view: str
    """A view, or `ALL`."""
    dice: Statistic


def scores_by_view(evaluation: Path, data: Path) -> list[ViewScore]:
    """Dice by class and view: the rows of per_image.csv in `evaluation`, with the views of drawn.csv in `data`.

    Images in which a class is absent do not count for it. Raises `UserError` if a file cannot be read, or an image of
    one is not in the other.
    """
    rows = read_csv(evaluation / "per_image.csv")
    views = _views(data / DRAWN)
    if missing := sorted({row.image for row in rows} - views.keys()):
        raise UserError(f"{data / DRAWN} has no line for {missing[0]}: {evaluation} is of other images")
    shown = [row for row in rows if row.pixels_true and not math.isnan(row.dice)]
    result = []
    for bone in dict.fromkeys(row.class_name for row in shown):
        own = [row for row in shown if row.class_name == bone]
        result.append(ViewScore(bone, ALL, _dice(own)))
        for view in dict.fromkeys(views.values()):
            if part := [row for row in own if views[row.image] == view]:
                result.append(ViewScore(bone, view, _dice(part)))
    return result


def table_of(scores: Iterable[ViewScore]) -> str:
    """The scores as a Markdown table: a line for each bone and view."""
    lines = ["| bone | view | Dice | 95 % interval | images | bodies |", "|---|---|---|---|---|---|"]
    for each in scores:
        dice = each.dice
        interval = "" if math.isnan(dice.low) else f"{dice.low:.3f} to {dice.high:.3f}"
        lines.append(f"| {each.bone} | {each.view} | {dice.mean:.3f} | {interval} | {dice.images} | {dice.patients} |")
    return "\n".join(lines)


def _views(path: Path) -> dict[str, str]:
    """View of each image, by its path, in the order of `views.VIEWS`."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [(row["image"], row["view"]) for row in csv.DictReader(file)]
    except (OSError, UnicodeDecodeError, csv.Error, KeyError) as error:
        raise UserError(f"{path}: cannot be read as the table of `data phantom --surfaces` ({error})") from None
    return dict(sorted(rows, key=lambda row: VIEWS.index(row[1]) if row[1] in VIEWS else len(VIEWS)))


def _dice(rows: list[ImageScores]) -> Statistic:
    return statistic([row.dice for row in rows], [row.patient for row in rows], bounds=(0.0, 1.0))
