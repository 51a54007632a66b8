"""Read and write `.safetensors` and PyTorch's `.pth` files, without running code from them."""

import json
import pickle
import re
import warnings
import zipfile
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
"""Key of the options, one JSON object, in the metadata header of a `.safetensors` file."""

TORCH_SUFFIXES = (".pth", ".pt")


@dataclass(frozen=True)
class WeightsFile:
    """Content of a file of weights."""

    arrays: dict[str, Any]
    """NumPy arrays by their names in the file; dictionaries where a `.pth` nests them."""
    options: dict[str, Any] = field(default_factory=dict)
    """What the file says about the model: shortcut, dropout, size, class_names, ...; may be empty."""
    notes: tuple[str, ...] = ()
    """Sentences on anything left out or changed on reading."""


def read_weights(path: str | Path) -> WeightsFile:
    """Read the arrays and options of a `.safetensors`, `.pth` or `.pt` file.

    Raises:
        UserError: the file does not exist, has another suffix, is damaged or contains code, or needs PyTorch, which is
            not installed.
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
    """Write `arrays` by name, and `options` (plain JSON values) into the header, atomically.

    Raises:
        RunError: the file cannot be written.
    """
    from safetensors.numpy import save

    metadata = {"format": "pt", OPTIONS_KEY: json.dumps(dict(options), sort_keys=True)}
    contiguous = {name: np.array(array, order="C") for name, array in arrays.items()}
    _write(Path(path), save(contiguous, metadata=metadata))


def write_pth(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write arrays by name as a PyTorch state dict, or nested dictionaries of them, atomically.

    Arrays become tensors; numbers, text, lists and None stay as they are. A state dict has no place for options.

    Raises:
        RunError: the file cannot be written.
        UserError: PyTorch is not installed.
    """
    torch = import_torch(Path(path))

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
        raise UserError(f"{path} is not a readable .safetensors file: {error}") from None
    except (AttributeError, TypeError) as error:
        raise UserError(f"{path} holds arrays of a type that NumPy lacks: {error}") from None
    try:
        options = json.loads(metadata.get(OPTIONS_KEY, "{}"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: the options in its header are not valid JSON: {error}") from None
    if not isinstance(options, dict):
        raise UserError(f"{path}: the options in its header are not a JSON object")
    return WeightsFile(arrays, options)


def _read_pth(path: Path) -> WeightsFile:
    torch = import_torch(path)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(entry.compress_type or entry.file_size != entry.compress_size for entry in archive.infolist()):
                    raise UserError(f"{path} is refused as a bomb: it is compressed, as no state dict of PyTorch is")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old file formats; what matters is checked by name and shape later
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = re.search(r"WeightsUnpickler error: (.*)", str(error))
        raise UserError(
            f"{path} is refused: it holds Python objects other than plain arrays, and loading those could run code. "
            f"Save `model.state_dict()`, not the model itself.{f' (PyTorch: {reason[1].strip()})' if reason else ''}"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged or not a PyTorch file: {str(error) or 'it ends too early'}") from None
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}; a state dict (arrays by name) is needed")
    return WeightsFile(_to_numpy(torch, content, path))


def _to_numpy(torch: ModuleType, value: Any, path: Path) -> Any:
    """Convert every dense tensor in `value`, at any depth of dictionaries, to a NumPy array."""
    if isinstance(value, Mapping):
        return {str(key): _to_numpy(torch, item, path) for key, item in value.items()}
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_quantized:
        return value
    if value.nbytes > value.untyped_storage().nbytes():
        raise UserError(f"{path} is refused as a bomb: a tensor of shape {tuple(value.shape)} expands a smaller one")
    value = value.detach().contiguous()
    if value.dtype == torch.bfloat16:
        import ml_dtypes

        return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return value.numpy()


def import_torch(path: Path) -> ModuleType:
    """Import PyTorch, which the file `path` needs. Raises `UserError` if it is not installed."""
    try:
        import torch
    except ImportError:
        raise UserError(f"{path}: {path.suffix} files need PyTorch: pip install 'pdrunet-jax[torch]'") from None
    return torch


def _write(path: Path, data: bytes) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, data)
