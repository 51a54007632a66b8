"""Make a file of shipped weights and its card from a run."""

import json
import string
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pdrunet_jax.config import MAY_CHANGE, diff, read
from pdrunet_jax.model.files import read_weights, write_safetensors
from pdrunet_jax.model.load import find_run, load_weights
from pdrunet_jax.model.shipped import FOLDER, SUFFIX
from pdrunet_jax.runtime.digest import CONTENT, SETTINGS, content_digest
from pdrunet_jax.runtime.errors import DataError, UserError
from pdrunet_jax.runtime.files import atomic_write, writing
from pdrunet_jax.runtime.opening import read_text
from pdrunet_jax.runtime.run_folder import RunFolder
from pdrunet_jax.weights.by_view import scores_by_view, table_of

_OF_THE_DATA = (*(name for name in MAY_CHANGE if name != "train.steps"), "data.phantoms", "data.split_seed", "seed")
"""Settings in which runs of one recipe may differ."""

TEMPLATE = Path(__file__).with_name("card.txt")
"""Text of a card, with $names for what comes from the run."""


def publish(run: Path, name: str, scores: Sequence[tuple[str, Path]], folder: Path = FOLDER) -> tuple[Path, Path]:
    """Write NAME.safetensors and NAME.md into `folder`; returns both paths.

    Args:
        run: a finished run folder.
        name: letters, digits and hyphens.
        scores: title and folder of each evaluation that the card shows, of images that `data phantom` drew. It scores
            this run, or another of the same recipe that was trained on other bodies: weights that were trained on all
            bodies are scored on none.
        folder: where weights are shipped from.

    Raises `UserError` if the run is not finished or an evaluation is of another recipe, `RunError` if nothing can be
    written.
    """
    if not name or set(name) - set(string.ascii_lowercase + string.digits + "-"):
        raise UserError(f"{name!r}: a name has small letters, digits and hyphens only")
    if not scores:
        raise UserError("give --scores TITLE FOLDER: weights are not shipped without scores")
    place = RunFolder(run)
    if not place.best.is_file():
        raise UserError(f"{run} has no best.safetensors; publish a finished run")
    loaded = load_weights(run)
    if loaded.options.get("threshold") is None and (loaded.options["outputs"] == 1 or loaded.multilabel):
        raise UserError(f"{run} is not finished: start the same training command again")
    file = read_weights(place.best)
    options = {key: value for key, value in file.options.items() if key not in (CONTENT, SETTINGS)}
    tables = "\n\n".join(_scores(title, where, place) for title, where in scores)
    card = string.Template(read_text(TEMPLATE)).substitute(_facts(place, name, options, file.arrays), scores=tables)
    weights, text = folder / f"{name}{SUFFIX}", folder / f"{name}.md"
    write_safetensors(weights, file.arrays, {**options, CONTENT: content_digest(file.arrays, options)})
    with writing(text):
        atomic_write(text, card)
    return weights, text


def _facts(run: RunFolder, name: str, options: dict[str, Any], arrays: dict[str, Any]) -> dict[str, str]:
    """What the run says about itself, by the names in the template."""
    config = read(run.config_file)
    environment = tomllib.loads(read_text(run.config_file)).get("environment", {})
    height, width = (options["size"][0], options["size"][-1])
    images = options.get("step", config.train.steps) * config.train.batch_size
    threshold = options.get("threshold")
    thresholds = threshold if isinstance(threshold, list) else [threshold]
    return {
        "name": name,
        "classes": ", ".join(options["class_names"]),
        "network": f"{options['name']}, {options['filters']} filters",
        "parameters": f"{sum(array.size for array in arrays.values()):,}",
        "size": f"{height} x {width}",
        "fit": str(options.get("fit", "stretch")),
        "threshold": ", ".join("none" if each is None else f"{each:g}" for each in thresholds),
        "images": f"{images:,}",
        "steps": f"{options.get('step', config.train.steps):,}",
        "revision": str(environment.get("git", "unknown")),
        "version": str(environment.get("pdrunet_jax", "unknown")),
        "dice": f"{options.get('val_dice', float('nan')):.3f}",
    }


def _scores(title: str, folder: Path, run: RunFolder) -> str:
    """The scores of one evaluation by bone and view, under its title. Raises `UserError` if it is of another recipe."""
    path = folder / "summary.json"
    try:
        about = json.loads(read_text(path))["about"]
        weights, data = Path(about["weights"]), Path(about["data"])
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not the summary that `evaluate --weights RUN --output {folder}` writes") from None
    other = find_run(weights)
    if other is None:
        raise UserError(f"{folder} has the scores of {weights}, whose settings are unknown: evaluate a run folder")
    if differing := diff(read(run.config_file), read(other.config_file), ignore=_OF_THE_DATA):
        raise DataError(f"{folder} has the scores of {weights}, which is of another recipe than {run.path}", differing)
    own = other.path.resolve() == run.path.resolve()
    whose = "These weights." if own else "Weights of the same recipe, trained without these bodies."
    return f"### {title}\n\n{whose}\n\n{table_of(scores_by_view(folder, data))}"
