"""Read and write files of weights, `.safetensors` and PyTorch's, without running code from them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from pdrunet_jax.model.torch_files import import_torch, read_torch
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.files import atomic_write, writing
from pdrunet_jax.runtime.opening import open_regular

OPTIONS_KEY = "pdrunet"
"""Key of the options, one JSON object, in the metadata header of a `.safetensors` file."""

TORCH_SUFFIXES = (".pth", ".pt")
"""Suffixes that PyTorch's files are written under; they are read under any."""

OTHER_KINDS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the weights themselves: run `git lfs pull` where it is from"),
    (b"\x1f\x8b", "compressed with gzip: unpack it with `gzip -dc {name} > weights.pth`"),
    (b"BZh", "compressed with bzip2: unpack it with `bzip2 -dc {name} > weights.pth`"),
    (b"\xfd7zXZ\0", "compressed with xz: unpack it with `xz -dc {name} > weights.pth`"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: unpack it with `zstd -dc {name} > weights.pth`"),
    (b"\x89HDF\r\n", "an HDF5 file, as Keras writes them; a PyTorch or .safetensors file is needed"),
    (b"\x93NUMPY", "a single array of NumPy; a PyTorch or .safetensors file is needed"),
)
"""First bytes of files that are found in the place of weights."""


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
    """Read the arrays and options of a `.safetensors` file or a file of PyTorch, whatever its suffix.

    Raises:
        UserError: the file does not exist, is of another kind, is damaged or contains code, or needs PyTorch, which is
            not installed.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: there is no such file")
    try:
        with open_regular(path) as file:
            head = file.read(512)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    _check_kind(path, head)
    pickled = head.startswith((b"PK\x03\x04", b"\x80"))
    named = path.suffix.lower() == ".safetensors"
    try:
        if head[8:9] == b"{" or (named and not pickled):
            weights = _read_safetensors(path)
            return weights if named else replace(weights, notes=("read as .safetensors, which its content is",))
        if pickled:
            return WeightsFile(read_torch(path), notes=("read as a file of PyTorch, which its content is",) * named)
    except RecursionError:
        raise UserError(f"{path} is nested too deeply; refused") from None
    raise UserError(f"{path} is neither a .safetensors nor a PyTorch file, or damaged: it begins with {head[:8]!r}")


def write_safetensors(path: str | Path, arrays: Mapping[str, np.ndarray], options: Mapping[str, Any]) -> None:
    """Write `arrays` by name, and `options` (plain JSON values) into the header, atomically.

    Raises:
        RunError: the file cannot be written.
    """
    from safetensors.numpy import save

    metadata = {"format": "pt", OPTIONS_KEY: json.dumps(dict(options), sort_keys=True)}
    contiguous = {name: np.array(array, order="C") for name, array in arrays.items()}
    _write(Path(path), _ordered(save(contiguous, metadata=metadata)))


def _ordered(content: bytes) -> bytes:
    """The content of a `.safetensors` file with its metadata in order: the library writes them in a random one."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[end:]


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


def _check_kind(path: Path, head: bytes) -> None:
    """Raise `UserError` that says what a file is that begins with `head`, if it is not weights."""
    kind = next((kind.format(name=path.name) for magic, kind in OTHER_KINDS if head.startswith(magic)), None)
    text = " ".join(head[:60].decode(errors="replace").split())
    if not head:
        kind = "damaged: it is empty"
    elif text.lower().startswith(("<!doctype html", "<html", "<?xml", "<head")):
        kind = "a web page: the download needs a login or another link. Open the link in a browser, and save the file"
    elif head[257:262] == b"ustar":
        kind = "a tar archive of files: unpack it with `tar -xf` first"
    elif kind is None and len(text) > 8 and text.isprintable() and head[8:9] != b"{":
        kind = f"text ({text!r}), no weights: was the download refused?"
    if kind is not None:
        raise UserError(f"{path} is {kind}")


def _read_safetensors(path: Path) -> WeightsFile:
    import ml_dtypes  # noqa: F401 - teaches NumPy the name bfloat16
    from safetensors import SafetensorError, safe_open

    try:
        open_regular(path).close()  # a pipe would block
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


def _write(path: Path, data: bytes) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, data)
