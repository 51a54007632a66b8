"""Machine description and measured peak performance (roofline)."""

import os
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from pdrunet_jax.runtime.run_folder import git_revision

FLOPS_PER_PIXEL = 0.721e6
"""FLOPs of the forward pass with 40 filters, a multiply-add counted as two; a training step takes three times that."""


def facts() -> dict[str, Any]:
    """Processor, cores, versions and revision; nothing that identifies the machine or its owner."""
    names = ("jax", "jaxlib", "flax", "torch", "numpy")
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "revision": git_revision(),
        **{name: metadata.version(name) for name in names},
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def environment(**variables: str) -> dict[str, str]:
    """This process's environment with `variables`, for a program that keeps its bytecode, as installed ones do."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"} | variables


def roofline(precision: str = "float32") -> dict[str, float]:
    """Peak matrix product in FLOP/s and peak copy bandwidth in bytes/s, measured with PyTorch: the best of 10 each."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if precision == "bfloat16" and device == "cuda" else torch.float32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    n, length = (8192, 2**28) if device == "cuda" else (2048, 2**26)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    x, y = (torch.ones(length, device=device) for _ in range(2))

    def best(function: Any, repeats: int = 10) -> float:
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    return {
        "flops": 2 * n**3 / best(lambda: a @ b),
        "bytes_per_s": 8 * length / best(lambda: y.copy_(x)),
    }
