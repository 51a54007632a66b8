"""JAX computes with the requested precision, and the first line of output names it."""

import os
import subprocess
import sys

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
