"""Configurations in and out: TOML files, plain dictionaries, and the difference between two of them."""

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import TypeAdapter, ValidationError

from pdrunet_jax.config import Config
from pdrunet_jax.errors import UserError


def from_dict(values: Mapping[str, Any], source: str) -> Config:
    """Check `values` and make them a `Config`; what is left out keeps its default.

    `source` names the file or option in the message. Raises `UserError` that lists every unknown key, wrong type and
    value out of bounds.
    """
    try:
        config = _adapter().validate_python(values)
    except ValidationError as error:
        problems = "\n".join(f"  - {_explain(item)}" for item in error.errors())
        raise UserError(f"{source} cannot be used:\n{problems}") from None
    _check_combinations(config, source)
    return config


def check(config: Config, source: str) -> Config:
    """Check the bounds of a `Config` that was assembled without them, for example from the command line."""
    return from_dict(to_dict(config, none=True), source)


def to_dict(config: Config, *, none: bool = False) -> dict[str, Any]:
    """`config` as nested dictionaries; settings that are None are left out (TOML has no null) unless `none`."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items() if none or item is not None}
        return list(value) if isinstance(value, tuple) else value

    result: dict[str, Any] = plain(dataclasses.asdict(config))
    return result


def to_toml(config: Config, header: str = "") -> str:
    """`config` as TOML text below `header`, which becomes comment lines."""
    comment = "".join(f"# {line}\n" if line else "#\n" for line in header.splitlines())
    return comment + tomli_w.dumps(to_dict(config))


def load(name: str | Path) -> Config:
    """The configuration `name`: a file, then `configs/NAME.toml`, then the copy inside the installed package.

    Raises `UserError` if there is none or if it cannot be used.
    """
    path = Path(name)
    if path.suffix == ".toml" and not path.is_file():
        raise UserError(f"--config {name}: there is no such file")
    if path.is_file():
        return read(path)
    local = Path("configs") / f"{name}.toml"
    if local.is_file():
        return read(local)
    shipped = resources.files("pdrunet_jax") / "configs"
    if not shipped.is_dir():  # an editable install, where the configurations lie beside the package
        shipped = resources.files("pdrunet_jax").joinpath("..", "configs")
    names = sorted(item.name.removesuffix(".toml") for item in shipped.iterdir() if item.name.endswith(".toml"))
    if str(name) in names:
        return parse((shipped / f"{name}.toml").read_text(encoding="utf-8"), f"configuration {name}")
    raise UserError(
        f"--config {name}: no file of that name, no configs/{name}.toml and none shipped; "
        f"the shipped ones are {', '.join(names)}"
    )


def read(path: Path) -> Config:
    """The configuration in a TOML file; raises `UserError` that names it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return parse(text, str(path))


def parse(text: str, source: str) -> Config:
    """TOML `text` as a `Config`; raises `UserError` that names `source`."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{source} is not valid TOML: {error}") from None
    except RecursionError:
        raise UserError(f"{source} is nested too deeply; refused") from None
    values.pop("environment", None)  # a run's config.toml records versions there; they are no settings
    return from_dict(values, source)


def diff(old: Config, new: Config, ignore: tuple[str, ...] = ()) -> list[str]:
    """The settings that differ, one line each: `optim.learning_rate: 0.001 -> 0.003`.

    `ignore` holds settings (`train.steps`) and sections (`tracking`) that may differ.
    """
    before, after = _flat(to_dict(old, none=True)), _flat(to_dict(new, none=True))
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and key not in ignore and key.split(".")[0] not in ignore
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        result |= _flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return result


@cache
def _adapter() -> TypeAdapter[Config]:
    return TypeAdapter(Config)


def _explain(item: Any) -> str:
    """One pydantic error in the words of a user of TOML and options."""
    location = [str(part) for part in item["loc"]]
    name = ".".join(location)
    if item["type"] == "unexpected_keyword_argument":
        known = to_dict(Config(), none=True)
        for part in location[:-1]:
            known = known.get(part, {})
        close = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
        return f"unknown setting {name}; {hint}"
    return f"{name}: {item['msg'][0].lower()}{item['msg'][1:]}, not {item['input']!r}"


def _check_combinations(config: Config, source: str) -> None:
    """What no single setting shows."""
    problems = []
    if config.train.batch_size % config.optim.accumulate:
        problems.append(
            f"optim.accumulate = {config.optim.accumulate} does not divide train.batch_size = {config.train.batch_size}"
        )
    if config.optim.warmup_steps >= config.train.steps:
        problems.append(f"optim.warmup_steps = {config.optim.warmup_steps} leaves nothing of train.steps")
    if config.data.val_fraction + config.data.test_fraction >= 1:
        problems.append("data.val_fraction and data.test_fraction together leave nothing to train on")
    if config.data.soft_masks and len(config.data.classes) > 1:
        problems.append("data.soft_masks is for one class; data.classes declares more")
    if problems:
        raise UserError(f"{source} cannot be used:\n" + "\n".join(f"  - {problem}" for problem in problems))
