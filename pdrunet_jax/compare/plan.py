"""Plan of a comparison: the networks, their number of steps, and what all have in common; stored as plan.toml."""

import dataclasses
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import ConfigDict, TypeAdapter, ValidationError

from pdrunet_jax.config import Config, ModelConfig, diff, from_dict, to_dict
from pdrunet_jax.model.build import read_network, with_network
from pdrunet_jax.model.folds import MAY_DIFFER
from pdrunet_jax.runtime.errors import DataError, UserError
from pdrunet_jax.runtime.files import atomic_write, is_present, writing
from pdrunet_jax.runtime.opening import read_text
from pdrunet_jax.runtime.run_folder import MOST_STEPS

Budget = Literal["steps", "time"]

OF_THE_DATA = ("in_channels", "outputs")
"""Options of a network that are the same for all, because they decide what is read from the data."""

_HEADER = "# Plan of a comparison, written by the program. Start the same command again to go on with it.\n\n"


@dataclasses.dataclass(frozen=True)
class PlannedModel:
    """One network of a comparison."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    network: str
    """Full name, as in "unet filters=32"."""
    steps: int
    """Training steps."""
    model: ModelConfig
    """All options."""

    @property
    def folder(self) -> str:
        """Name of the folder with its trainings, as in unet_filters-32."""
        return self.network.replace(" ", "_").replace("=", "-")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a comparison trains."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    data: str
    """Fingerprint of the dataset."""
    budget: Budget
    folds: int
    """Number of folds; 0 without."""
    models: tuple[PlannedModel, ...]
    """All networks so far, in the order in which they were added."""
    settings: Config
    """What all have in common; `settings.model` is the default, whatever the networks are."""


def full_name(text: str, settings: Config) -> str:
    """The network `text` as it is always written: its name, then the options given with it in a fixed order.

    Raises `UserError` if it is no network with `settings`.
    """
    given = read_network(text)
    if problems := [option for option in OF_THE_DATA if option in given]:
        raise UserError(
            f"the network {text!r}: {problems[0]} has to be the same for all networks; give --model."
            f"{problems[0].replace('_', '-')}"
        )
    model = dataclasses.asdict(with_network(settings, text).model)
    return " ".join([model["name"], *(f"{key}={model[key]}" for key in model if key in given and key != "name")])


def for_steps(config: Config, steps: int) -> Config:
    """The settings for another number of steps: what is counted in steps keeps its share of the whole training.

    Validations, checkpoints and lines of the log are as many as before, and warm-up is as long a part.
    """
    if steps == config.train.steps:
        return config
    share = steps / config.train.steps
    periods = ("eval_every", "save_every", "log_every")
    every = {name: min(MOST_STEPS, math.ceil(getattr(config.train, name) * share)) for name in periods}
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, steps=steps, **every),
        optim=dataclasses.replace(
            config.optim,
            warmup_steps=math.floor(config.optim.warmup_steps * share),
            restarts=tuple(max(1, round(step * share)) for step in config.optim.restarts),
        ),
    )


def equal_time(steps: int, seconds: float, other: float) -> int:
    """The number of steps of `other` seconds that take as long as `steps` of `seconds`; at least 1."""
    return max(1, min(MOST_STEPS, round(steps * seconds / other)))


def read_plan(folder: Path) -> Plan | None:
    """The plan of the comparison in `folder`; None if there is none. Raises `UserError` if it cannot be read."""
    path = folder / "plan.toml"
    if not is_present(path):
        if any(folder.glob("*/seed_*")):
            raise UserError(
                f"{path} is gone, and {folder} holds trainings; restore it, or choose another --output for a new "
                "comparison"
            )
        return None
    try:
        values = tomllib.loads(read_text(path))
        settings = from_dict(values.pop("settings"), str(path))
        return TypeAdapter(Plan).validate_python({**values, "settings": settings})
    except (OSError, ValueError, KeyError, RecursionError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path} is not the plan of a comparison ({reason}); restore it, or choose another --output"
        ) from None


def write_plan(plan: Plan, folder: Path) -> None:
    """Write plan.toml. Raises `RunError`."""

    def without_none(value: Any) -> Any:  # TOML has no null
        if isinstance(value, Mapping):
            return {key: without_none(item) for key, item in value.items() if item is not None}
        return [without_none(item) for item in value] if isinstance(value, list | tuple) else value

    values = {**without_none(dataclasses.asdict(plan)), "settings": to_dict(plan.settings)}
    del values["settings"]["model"]
    with writing(folder / "plan.toml"):
        atomic_write(folder / "plan.toml", _HEADER + tomli_w.dumps(values))


def require_same(old: Plan, new: Plan, folder: Path) -> None:
    """Raise `DataError` with what differs if `new` does not go on with the comparison `old` in `folder`.

    Networks may be added. Settings without effect on results may change, as when a run is resumed.
    """
    problems = [
        f"--{name}: {before or 'none'} -> {after or 'none'}"
        for name, before, after in (("budget", old.budget, new.budget), ("folds", old.folds, new.folds))
        if before != after
    ]
    problems += diff(old.settings, new.settings, ignore=(*MAY_DIFFER[1:], "seed"))
    known = {each.network: each.model for each in old.models}
    for each in new.models:
        was, now = (
            dataclasses.replace(new.settings, model=model)
            for model in (known.get(each.network, each.model), each.model)
        )
        problems += [f"{each.network}: {line}" for line in diff(was, now)]
    if problems:
        remedy = "give the earlier settings to go on with it, or choose another --output"
        raise DataError(f"{folder} holds a comparison with other settings; {remedy}", problems)
    if old.data != new.data:
        raise UserError(
            f"images, masks, patients or splits of {new.settings.data.root} have changed since the comparison in "
            f"{folder} was begun; restore them, or choose another --output"
        )
