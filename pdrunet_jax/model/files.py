"""Files that hold arrays by name: `.safetensors`, and PyTorch's `.pth`, read without running code from them."""

import json
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.files import atomic_write, writing

OPTIONS_KEY = "pdrunet"
"""Key of our options, one JSON object, in the metadata header of a `.safetensors` file."""

TORCH_SUFFIXES = (".pth", ".pt")


@dataclass(frozen=True)
class WeightsFile:
    """What one file of weights holds."""

    arrays: dict[str, Any]
    """NumPy arrays by the names in the file; dictionaries where a `.pth` nests them."""
    options: dict[str, Any] = field(default_factory=dict)
    """What the file says of the model beyond shapes: shortcut, dropout, size, class_names, ...; empty if nothing."""
    notes: tuple[str, ...] = ()
    """What was left out or changed on reading, a sentence each."""


def read_weights(path: str | Path) -> WeightsFile:
    """The arrays and options in `path`, a `.safetensors`, `.pth` or `.pt` file.

    Raises:
        UserError: there is no such file, it has another suffix, is damaged, holds code, or PyTorch is needed and not
            installed.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return _read_pth(path)
    raise UserError(f"{path}: weights are read from .safetensors, .pth or .pt files")


def write_safetensors(path: str | Path, arrays: Mapping[str, np.ndarray], options: Mapping[str, Any]) -> None:
    """Write `arrays` by name, and `options` (plain JSON values) into the header; all of it or nothing.

    Raises:
        RunError: the file cannot be written.
    """
    from safetensors.numpy import save

    metadata = {"format": "pt", OPTIONS_KEY: json.dumps(dict(options), sort_keys=True)}
    contiguous = {name: np.array(array, order="C") for name, array in arrays.items()}
    _write(Path(path), save(contiguous, metadata=metadata))


def write_pth(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write arrays by name as a PyTorch state dict, or nested dictionaries of them; all of it or nothing.

    Arrays become tensors; what else there is (numbers, text, lists, None) stays as it is. A state dict has no place for
    options.

    Raises:
        RunError: the file cannot be written.
        UserError: PyTorch is not installed.
    """
    torch = _torch(Path(path))

    def tensors(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: tensors(item) for key, item in value.items()}
        return torch.from_numpy(np.array(value, order="C")) if isinstance(value, np.ndarray) else value

    buffer = BytesIO()
    torch.save(tensors(content), buffer)
    _write(Path(path), buffer.getvalue())


def _read_safetensors(path: Path) -> WeightsFile:
    import ml_dtypes  # noqa: F401 - teaches NumPy the name bfloat16
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no readable .safetensors file: {error}") from None
    except (AttributeError, TypeError) as error:
        raise UserError(f"{path} holds arrays of a type that NumPy lacks: {error}") from None
    try:
        options = json.loads(metadata.get(OPTIONS_KEY, "{}"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: the options in its header are not valid JSON: {error}") from None
    if not isinstance(options, dict):
        raise UserError(f"{path}: the options in its header are no JSON object")
    return WeightsFile(arrays, options)


def _read_pth(path: Path) -> WeightsFile:
    torch = _torch(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old file formats; what matters is checked by name and shape later
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = re.search(r"WeightsUnpickler error: (.*)", str(error))
        raise UserError(
            f"{path} is refused: it holds Python objects other than plain arrays, and loading those could run code. "
            f"Save `model.state_dict()`, not the model itself.{f' (PyTorch: {reason[1].strip()})' if reason else ''}"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged or no PyTorch file: {str(error) or 'it ends too early'}") from None
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}; a state dict (arrays by name) is needed")
    return WeightsFile(_to_numpy(torch, content))


def _to_numpy(torch: ModuleType, value: Any) -> Any:
    """`value` with every dense tensor in it, at any depth of dictionaries, as a NumPy array."""
    if isinstance(value, Mapping):
        return {str(key): _to_numpy(torch, item) for key, item in value.items()}
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_quantized:
        return value
    value = value.detach().contiguous()
    if value.dtype == torch.bfloat16:
        import ml_dtypes

        return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return value.numpy()


def _torch(path: Path) -> ModuleType:
    try:
        import torch
    except ImportError:
        raise UserError(f"{path}: {path.suffix} files need PyTorch: pip install 'pdrunet-jax[torch]'") from None
    return torch


def _write(path: Path, data: bytes) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, data)
