"""The kernels of `kernels.cc` as custom calls of XLA: compiled for this processor by its C++ compiler.

That takes some seconds, once: the library is kept in the user's cache folder.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
from importlib import metadata
from pathlib import Path

import jax

from pdrunet_jax.runtime.store import discard_entry, key_of, read_entry, write_entry

FUNCTIONS = ("pdrunet_forward", "pdrunet_backward", "pdrunet_end", "pdrunet_end_gradient")
"""Functions of a library. The custom calls have these names, with the dtype behind."""

ELEMENTS = {"float32": "float", "float64": "double"}
"""The dtypes, and their names in C++. Each has a library of its own, since float64 is for tests."""

COMPILERS = ("c++", "g++", "clang++")
"""Tried in this order, unless the environment variable CXX names another."""

SOURCE = Path(__file__).with_name("kernels.cc")

# Unlike -ffast-math, these keep sums in their order and let NaN through.
_FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
_SECONDS = 300  # for the compiler

_lock = threading.Lock()
_problems: dict[str, str | None] = {}  # what `problem` has found


class UnavailableError(Exception):
    """The kernels cannot be used here; the message says why."""


def problem(dtype: str = "float32") -> str | None:
    """Load the kernels for `dtype`, compiled if need be, and register their calls. Why they cannot be used, or None."""
    with _lock:
        if dtype not in _problems:
            try:
                library = _open(dtype)
            except UnavailableError as error:
                _problems[dtype] = str(error)
                return str(error)
            for name, call in zip(FUNCTIONS, calls(dtype), strict=True):
                jax.ffi.register_ffi_target(call, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
            _problems[dtype] = None
        return _problems[dtype]


def calls(dtype: str = "float32") -> tuple[str, ...]:
    """Names of the custom calls for `dtype`, in the order of `FUNCTIONS`."""
    return tuple(f"{name}_{dtype}" for name in FUNCTIONS)


def _open(dtype: str = "float32") -> ctypes.CDLL:
    element = f"-DELEMENT={ELEMENTS[dtype]}"
    command = [*_compiler(), *_FLAGS, *_processor_flags(), element, "-I", jax.ffi.include_dir()]
    key = key_of(hashlib.sha256(SOURCE.read_bytes()).hexdigest(), metadata.version("jaxlib"), command, _processor())
    if stored := read_entry("kernels", key):
        try:
            return _load(stored)
        except UnavailableError as error:
            discard_entry("kernels", key, str(error))
    library = _compile(command)
    opened = _load(library)
    write_entry("kernels", key, library)
    return opened


def _compiler() -> list[str]:
    named = shlex.split(os.environ.get("CXX", ""))
    for name in [named[0]] if named else COMPILERS:
        if path := shutil.which(name):
            return [path, *named[1:]]
    raise UnavailableError(f"there is no C++ compiler ({named[0] if named else ', '.join(COMPILERS)})")


def _processor_flags() -> tuple[str, ...]:
    if platform.machine().lower() in ("arm64", "aarch64"):
        return ("-mcpu=native",)
    return ("-march=native", "-mprefer-vector-width=512")


def _processor() -> str:
    """What -march=native depends on, since homes may be shared by different computers."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _compile(command: list[str]) -> bytes:
    with tempfile.TemporaryDirectory(prefix="pdrunet") as folder:
        target = Path(folder) / "kernels.so"
        try:
            # In a session of its own, because the compiler starts further processes.
            process = subprocess.Popen(
                [*command, str(SOURCE), "-o", str(target)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            raise UnavailableError(f"{command[0]} does not run: {error.strerror}") from error
        try:
            _, messages = process.communicate(timeout=_SECONDS)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                raise UnavailableError(f"{command[0]} does not end within {_SECONDS} s") from error
            raise
        if process.returncode or not target.is_file():
            lines = [line for line in messages.splitlines() if "error" in line] or ["no message"]
            raise UnavailableError(f"{command[0]} does not compile {SOURCE.name}: {lines[0]}")
        return target.read_bytes()


def _load(library: bytes) -> ctypes.CDLL:
    # The file may go as soon as it is mapped.
    with tempfile.TemporaryDirectory(prefix="pdrunet") as folder:
        path = Path(folder) / "kernels.so"
        path.write_bytes(library)
        try:
            opened = ctypes.CDLL(str(path))
            _ = [getattr(opened, name) for name in FUNCTIONS]
        except (OSError, AttributeError) as error:
            raise UnavailableError(f"the compiled {SOURCE.name} does not load: {error}") from error
        return opened
