"""JAX computes with the requested precision, and the first line of output names it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys, jax, jax.numpy as jnp
from pdrunet_jax.runtime.devices import configure_jax, describe_device
configure_jax(sys.argv[1], deterministic=True)
print(describe_device(sys.argv[1], deterministic=True))
print(jnp.ones(1).dtype if sys.argv[1] != "float64" else jnp.ones(1, jnp.float64).dtype)
text = jax.jit(jnp.matmul).lower(jnp.ones((2, 2), jnp.float32), jnp.ones((2, 2), jnp.float32)).as_text()
print("precision = [HIGHEST, HIGHEST]" in text)
"""


@pytest.mark.parametrize(
    ("precision", "dtype", "highest"),
    [("float32", "float32", True), ("float64", "float64", True), ("bfloat16", "float32", False)],
)
def test_precision_is_set_and_named(precision: str, dtype: str, highest: bool) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, precision],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    line, found, setting = result.stdout.splitlines()
    assert line.startswith("cpu (")
    assert line.endswith(f", {precision}")
    assert (found, setting) == (dtype, str(highest))
    assert result.stderr == ""


def test_a_platform_that_does_not_exist_is_a_user_error() -> None:
    program = "from pdrunet_jax.runtime import cli, devices\ncli.run(lambda: print(devices.describe_device('float32')))"
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "JAX_PLATFORMS": "abacus"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: JAX finds no device")
    assert "JAX_PLATFORMS=cpu" in result.stderr


PLUGIN = """
def initialize():
    raise RuntimeError("Unable to load CUDA. Is it installed?")
"""
DEVICES = """
import pathlib, sys
from pdrunet_jax.runtime import cli, devices
if "gpu" in sys.argv:
    devices.nvidia_gpu = lambda: True
def command():
    for _ in range(2):  # the second call has nothing to add
        print(devices.describe_device("float32"))
cli.run(command)
"""


@pytest.fixture
def plugin(tmp_path: Path) -> str:
    """A folder for PYTHONPATH with a CUDA plug-in that does not start, as one without CUDA's libraries does not."""
    package = tmp_path / "jax_plugins" / "xla_cuda12"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(PLUGIN)
    return str(tmp_path)


@pytest.mark.parametrize("installed", [False, True])
@pytest.mark.parametrize("gpu", [False, True])
def test_cuda_that_is_not_there_is_explained(plugin: str, installed: bool, gpu: bool) -> None:
    def start(platforms: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(filter(None, (plugin if installed else "", os.environ.get("PYTHONPATH", ""))))
        env = {**os.environ, "JAX_PLATFORMS": platforms, "PYTHONPATH": path}
        command = [sys.executable, "-c", DEVICES, *(["gpu"] if gpu else [])]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    if not gpu:
        reason = "this machine has no NVIDIA GPU, or the GPU's driver is not loaded"
    elif installed:
        reason = "CUDA plug-in is installed but does not start (Unable to load CUDA. Is it installed?)"
    else:
        reason = "JAX has no CUDA plug-in; pip install"

    asked = start("cuda")
    assert asked.returncode == 2
    assert asked.stderr.startswith("error: JAX finds no device: ")
    assert reason in asked.stderr
    assert len(asked.stderr.splitlines()) == 1

    left_to_jax = start("")
    assert left_to_jax.returncode == 0
    warnings = left_to_jax.stderr.splitlines()
    assert len(warnings) == (1 if gpu or installed else 0)
    assert all(line.startswith("warning: JAX runs on the CPU: ") and reason in line for line in warnings)
