"""Make a file of shipped weights and its card from a run."""

import json
import string
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pdrunet_jax.config import MAY_CHANGE, Config, diff, read
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
_OF_THE_NETWORK = ("model.", "data.size", "data.fit", "data.multilabel")
"""Settings that make scores of one run say nothing about weights of another."""

TEMPLATE = Path(__file__).with_name("card.txt")
"""Text of a card, with $names for what comes from the run."""


def publish(run: Path, name: str, scores: Sequence[tuple[str, Path]], folder: Path = FOLDER) -> tuple[Path, Path]:
    """Write NAME.safetensors and NAME.md into `folder`; returns both paths.

    Args:
        run: a finished run folder.
        name: letters, digits and hyphens.
        scores: title and folder of each evaluation that the card shows, of images that `data phantom` drew. It scores
            this run, or another of the same network that was trained on other bodies: weights that were trained on
            all bodies are scored on none. The card lists the settings of training in which that one differs.
        folder: where weights are shipped from.

    Raises `UserError` if the run is not finished or an evaluation is of another network, `RunError` if nothing can be
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
    config, environment = read(run.config_file), tomllib.loads(read_text(run.config_file)).get("environment", {})
    lines = read_text(run.training_images).splitlines()
    drawn = sum(not line.startswith("#") for line in lines)  # of all runs that this one goes on from
    height, width = (options["size"][0], options["size"][-1])
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
        "trained": _trained(run) if config.data.surfaces else f"{_trained(run)}; {drawn:,} were drawn beforehand",
        "revision": str(environment.get("git", "unknown")),
        "version": str(environment.get("pdrunet_jax", "unknown")),
        "dice": f"{options.get('val_dice', float('nan')):.3f}",
    }


def _start_of(config: Config) -> RunFolder | None:
    """The run whose weights a training started from."""
    return None if config.train.weights is None else find_run(config.train.weights)


def _trained(run: RunFolder) -> str:
    """How long a run was trained and on how many X-rays, after the run whose weights it started from."""
    config, options = read(run.config_file), read_weights(run.best).options
    text = f"{options.get('step', config.train.steps):,} steps of {config.train.batch_size} drawn X-rays"
    if config.data.surfaces:
        text += ", none of them twice"
    if (start := _start_of(config)) is not None:
        return f"{_trained(start)}; then {text}"
    return text if config.train.weights is None else f"the weights {Path(config.train.weights).name}; then {text}"


def _scores(title: str, folder: Path, run: RunFolder) -> str:
    """The scores of one evaluation by bone and view. Raises `UserError` if it is of another network."""
    path = folder / "summary.json"
    try:
        about = json.loads(read_text(path))["about"]
        weights, data = Path(about["weights"]), Path(about["data"])
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not the summary that `evaluate --weights RUN --output {folder}` writes") from None
    other = find_run(weights)
    if other is None:
        raise UserError(f"{folder} has the scores of {weights}, whose settings are unknown: evaluate a run folder")
    config = read(run.config_file)
    differing = diff(config, read(other.config_file), ignore=(*_OF_THE_DATA, "train.weights"))
    if any(line.startswith(_OF_THE_NETWORK) for line in differing):
        raise DataError(f"{folder} has the scores of {weights}, which is another network than {run.path}", differing)
    start = _start_of(config)
    if other.path.resolve() == run.path.resolve():
        whose = "These weights."
    elif start is not None and other.path.resolve() == start.path.resolve():
        whose = "The weights that this training started from, which had not seen these bodies."
    else:
        whose = f"Weights of the same network, trained without these bodies: {_trained(other)}."
        if differing:
            whose += f" Other settings: {', '.join(f'`{line}`' for line in differing)}."
    return f"### {title}\n\n{whose}\n\n{table_of(scores_by_view(folder, data))}"
