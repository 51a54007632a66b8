"""Read what PyTorch has saved, without running code from it.

PyTorch's restricted unpickler (`weights_only=True`) makes tensors and plain Python values. Training scripts store a few
harmless objects next to them: numbers and arrays of NumPy, command-line arguments, paths. Stand-ins of this module take
their place, so that nothing of another library is called. Every other object is refused.
"""

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType
from typing import Any

import numpy as np

from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.extras import how_to_install

PLAIN = re.compile(r"[biuf][1248]")
"""NumPy's codes of types whose bytes are numbers."""


class _Ignored:
    """An object of no use here; takes any arguments and keeps none."""

    def __new__(cls, *_: Any, **__: Any) -> "_Ignored":
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None:
        """Ignore the state."""


class _DType:
    """`numpy.dtype` of numbers."""

    def __init__(self, code: str, *_: Any) -> None:
        self._code, self._order = str(code), "="

    def __setstate__(self, state: Any) -> None:
        self._order = str(state[1])

    @property
    def plain(self) -> np.dtype[Any] | None:
        """The type, if its bytes are numbers."""
        known = PLAIN.fullmatch(self._code) and self._order in "<>=|"
        return np.dtype(self._order + self._code) if known else None


class _Array:
    """`numpy.ndarray`; `value` is None unless it holds numbers."""

    def __init__(self, *_: Any) -> None:
        self.value: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if dtype.plain is not None:
            self.value = np.frombuffer(data, dtype.plain).reshape(shape, order="F" if fortran else "C").copy()


def _scalar(dtype: _DType, data: bytes) -> Any:
    return None if dtype.plain is None else np.frombuffer(data, dtype.plain, 1).item()


PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
LIGHTNING = (
    "lightning_fabric.utilities.data",
    "lightning.fabric.utilities.data",
    "pytorch_lightning.utilities.parsing",
)
STAND_INS: dict[Any, tuple[str, ...]] = {
    _scalar: ("numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar"),
    _Array: ("numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct"),
    _DType: ("numpy.dtype",),
    _Ignored: (
        "numpy.ndarray",  # an argument of _reconstruct
        "argparse.Namespace",
        "torch.torch_version.TorchVersion",
        *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in PATHS),
    ),
    dict: tuple(f"{module}.AttributeDict" for module in LIGHTNING),
}
"""What is made in place of the objects of these names."""


def read_torch(path: Path) -> dict[str, Any]:
    """Read a file of `torch.save`: NumPy arrays by name, in dictionaries as the file nests them.

    Raises:
        UserError: the file is damaged, holds other objects than arrays and plain values, or is another kind of archive;
            or PyTorch is not installed.
    """
    torch = import_torch(path)
    _check_archive(path)
    allowed = [(stand_in, name) for stand_in, names in STAND_INS.items() for name in names]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(allowed), path.open("rb") as file:
            warnings.simplefilter("ignore")  # of old file formats; what matters is checked by name and shape later
            content = torch.load(file, map_location="cpu", weights_only=True)  # by name it would go by the suffix
    except UnpicklingError as error:
        raise UserError(_refusal(path, str(error))) from None
    except Exception as error:  # damaged bytes can fail in any way
        reason = (str(error).strip() or "it ends too early").splitlines()[0]
        raise UserError(f"{path} is damaged or not a PyTorch file: {reason}") from None
    if isinstance(content, _Ignored):
        raise UserError(f"{path} holds no arrays; a state dict (arrays by name) is needed")
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}; a state dict (arrays by name) is needed")
    result: dict[str, Any] = _to_numpy(torch, content, path)
    return result


def import_torch(path: Path) -> ModuleType:
    """Import PyTorch, which the file `path` needs. Raises `UserError` if it is not installed."""
    try:
        import torch
    except ImportError:
        raise UserError(f"{path}: files of PyTorch need it installed: {how_to_install('torch')}") from None
    return torch


def _check_archive(path: Path) -> None:
    """Raise `UserError` if a file is a zip archive, but not one of `torch.save`, or is a bomb."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            if file.read(4) == b"PK\x03\x04":
                raise UserError(f"{path} is damaged: it ends too early; copy or download it again")
        return
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    names = [entry.filename for entry in entries]
    if not any(name.rpartition("/")[2] == "data.pkl" for name in names):
        if names and all(name.endswith(".npy") for name in names):
            raise UserError(f"{path} is an .npz archive of NumPy; a PyTorch or .safetensors file is needed")
        raise UserError(f"{path} is a zip archive of files ({', '.join(names[:3])}): unpack it first")
    if any("/code/" in name or name.rpartition("/")[2] == "constants.pkl" for name in names):
        raise UserError(
            f"{path} is a TorchScript program, whose code is not run. Save its weights alone: "
            f"torch.save(torch.jit.load({path.name!r}, map_location='cpu').state_dict(), 'weights.pth')"
        )
    if any(entry.compress_type or entry.file_size != entry.compress_size for entry in entries):
        raise UserError(f"{path} is refused as a bomb: it is compressed, as no state dict of PyTorch is")


def _refusal(path: Path, error: str) -> str:
    """Why a file with other objects is refused, and what to do."""
    found = re.search(r"GLOBAL (\S+)", error)
    name = f" ({found[1]})" if found else ""
    if _holds_module(path):
        what = f"it holds a whole pickled network{name}"
        how = (
            " Where its code is, and only if you trust the file, load it with weights_only=False, and torch.save() the "
            "state_dict() of its network."
        )
    else:
        what, how = f"it holds Python objects other than plain arrays{name}", ""
        if not found and (reason := re.search(r"WeightsUnpickler error: (.+)", error)):
            how = f" (PyTorch: {reason[1].strip()})"
    return (
        f"{path} is refused: {what}, and loading those could run code. Save `model.state_dict()`, not the model itself."
        f"{how}"
    )


def _holds_module(path: Path) -> bool:
    """Whether a pickle names a layer of PyTorch; False for an archive that is too damaged to tell."""
    limit = 1 << 24
    try:
        if not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                return b"torch.nn.modules" in file.read(limit)
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl")
            with archive.open(name) as entry:
                return b"torch.nn.modules" in entry.read(limit)
    except (OSError, StopIteration, zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError):
        return False


def _to_numpy(torch: ModuleType, value: Any, path: Path) -> Any:
    """Convert every dense tensor in `value`, at any depth of dictionaries, to a NumPy array."""
    if isinstance(value, Mapping):
        return {str(key): _to_numpy(torch, item, path) for key, item in value.items()}
    if isinstance(value, _Array):
        return value.value
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_quantized:
        return value
    if value.nbytes > value.untyped_storage().nbytes():
        raise UserError(f"{path} is refused as a bomb: a tensor of shape {tuple(value.shape)} expands a smaller one")
    value = value.detach().contiguous()
    if value.dtype == torch.bfloat16:
        import ml_dtypes

        return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return value.numpy()
