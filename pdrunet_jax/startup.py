"""Before the first computation: the arithmetic that was asked for, and a line that says what is really used."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax

from pdrunet_jax.compiling import dispatch_in_turn
from pdrunet_jax.errors import UserError

MATMUL_PRECISION = {"float32": "highest", "tf32": "tensorfloat32", "bfloat16": "default", "float64": "highest"}
"""JAX's name for each precision; its own default on recent NVIDIA GPUs would be TF32, not float32."""

_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def prepare(precision: str, deterministic: bool = False) -> str:
    """Set JAX up for `precision` and return a line that names device and precision: `cpu (2 cores), float32`.

    Call it before anything is computed: `deterministic` is an XLA flag, which is read when the device is first used.
    Warns on standard error when the machine has an NVIDIA GPU that JAX does not use. Raises `UserError` if JAX finds
    no device at all.
    """
    jax.config.update("jax_enable_x64", precision == "float64")
    jax.config.update("jax_default_matmul_precision", MATMUL_PRECISION[precision])
    dispatch_in_turn()
    gpu = nvidia_gpu()
    if deterministic and gpu and _DETERMINISTIC not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DETERMINISTIC}".strip()
    try:
        devices = jax.devices()
    except RuntimeError as error:
        raise UserError(f"JAX finds no device: {error}; JAX_PLATFORMS=cpu runs on the processor") from None
    platform = devices[0].platform
    if platform == "cpu" and gpu and os.environ.get("JAX_PLATFORMS", "") != "cpu":
        print(
            f"warning: this machine has a GPU ({gpu}) but JAX runs on the CPU; pip install 'pdrunet-jax[cuda12]'",
            file=sys.stderr,
        )
    here = jax.local_devices()
    where = f"cpu ({_cores()} cores)" if platform == "cpu" else f"{platform} ({len(here)} x {here[0].device_kind})"
    return f"{where}, {precision}{', deterministic' if deterministic and platform != 'cpu' else ''}"


def nvidia_gpu() -> str | None:
    """The name of an NVIDIA GPU of this machine, whether or not JAX can use it; None without one."""
    if not (Path("/proc/driver/nvidia/gpus").is_dir() or Path("/dev/nvidia0").exists()):
        return None
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        try:
            names = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
        except (OSError, subprocess.SubprocessError):
            names = []
        if names:
            return names[0].strip()
    return "NVIDIA"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
