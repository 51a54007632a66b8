"""Weights in the format of the Hugging Face Hub: a folder, or a repository, with model.safetensors and config.json."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pdrunet_jax.runtime.errors import DataError, UserError
from pdrunet_jax.runtime.extras import how_to_install
from pdrunet_jax.runtime.opening import read_regular

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
LIBRARY = "pdrunet-jax"
"""The library's name on the Hub, which also marks its config.json."""

_ADDRESS = re.compile(r"hf:/{1,2}(?P<repository>[^/@]+/[^/@]+)(@(?P<revision>.+))?")  # pathlib joins slashes


def config_text(options: Mapping[str, Any], version: str) -> str:
    """Content of config.json for weights with these options."""
    content = {"library_name": LIBRARY, "model_type": options["name"], "version": version, "options": dict(options)}
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def locate(weights: str | Path) -> Path:
    """The path of weights: of the file in a folder in the Hub's format, or of a download for `hf://OWNER/NAME`.

    `hf://OWNER/NAME@REVISION` names a branch, tag or commit. Other paths are returned as they are.

    Raises:
        UserError: The repository does not exist, cannot be reached or is not of this package, or huggingface_hub is
            missing.
    """
    if str(weights).startswith("hf:/"):
        return _download(str(weights))
    path = Path(weights)
    return path / WEIGHTS if (path / WEIGHTS).is_file() and not (path / "config.toml").exists() else path


def require_config(path: Path, options: Mapping[str, Any]) -> None:
    """Check the config.json beside weights in the Hub's format against the options in their header.

    Raises `UserError` if it is of another library or damaged, `DataError` that names the options that differ.
    """
    file = path.with_name(CONFIG)
    if path.name != WEIGHTS or not file.exists():
        return
    stated = _read_config(file)
    different = [
        f"{name} is {value!r}, in {WEIGHTS} {options.get(name)!r}"
        for name, value in stated.items()
        if options.get(name) != value
    ]
    if different:
        raise DataError(f"{file} and {WEIGHTS} are not of one export; export the run again", different)


def _read_config(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_regular(file))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}") from None
    found = content.get("library_name") if isinstance(content, dict) else None
    if found != LIBRARY or not isinstance(content.get("options"), dict):
        other = f"of {found!r}" if found not in (None, LIBRARY) else "of another library"
        raise UserError(f"{file} is {other}, not of {LIBRARY}: only what `export --format hub` writes can be loaded")
    options: dict[str, Any] = content["options"]
    return options


def _download(address: str) -> Path:
    address = re.sub("^hf:/+", "hf://", address)  # a path has one slash
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise UserError(f"{address}: give hf://OWNER/NAME, or hf://OWNER/NAME@REVISION")
    try:
        from huggingface_hub import errors, hf_hub_download
    except ImportError:
        raise UserError(f"{address} needs huggingface_hub: {how_to_install('hub')}") from None

    try:
        config = Path(hf_hub_download(match["repository"], CONFIG, revision=match["revision"]))
        _read_config(config)
        # Of the same commit: the branch may move between the two.
        return Path(hf_hub_download(match["repository"], WEIGHTS, revision=config.parent.name))
    except errors.LocalEntryNotFoundError:
        reason = "the Hub cannot be reached and nothing was downloaded before; check the connection, or HF_ENDPOINT"
    except errors.HFValidationError:
        reason = "this is not a name that the Hub allows; give hf://OWNER/NAME"
    except errors.GatedRepoError:
        reason = "access is restricted: ask for it on the repository's page and log in with `hf auth login`"
    except errors.RepositoryNotFoundError:
        reason = "there is no such repository, or it is private: check the name, or log in with `hf auth login`"
    except errors.RevisionNotFoundError:
        reason = "the repository has no such revision"
    except errors.EntryNotFoundError:
        reason = f"the repository lacks {CONFIG} or {WEIGHTS}: it was not written by `export --format hub`"
    except (errors.HfHubHTTPError, OSError) as error:
        reason = f"cannot be downloaded ({str(error).splitlines()[0]}); try again later"
    raise UserError(f"{address}: {reason}")
