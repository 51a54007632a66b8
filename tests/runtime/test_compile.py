"""The cache of compiled programs: filled by one process, used by the next, harmless when damaged."""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from pdrunet_jax.runtime import compile as compiling

PROGRAM = """
import jax.numpy as jnp
from pdrunet_jax.runtime import compile
print(compile.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8)))[0, 0])
"""


def run(cache: Path) -> subprocess.CompletedProcess[str]:
    own = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")  # of the tests
    environment = {name: value for name, value in os.environ.items() if name not in own}
    environment |= {"XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu", "JAX_LOGGING_LEVEL": "WARNING"}
    return subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)


def test_a_half_written_program_costs_a_warning_and_a_compilation(tmp_path: Path) -> None:
    first = run(tmp_path)
    stored = {path: path.stat().st_mtime_ns for path in (tmp_path / "pdrunet_jax").glob("*-cache")}
    assert stored
    cached = run(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "pdrunet_jax").glob("*-cache")} == stored
    for path in stored:
        os.truncate(path, path.stat().st_size // 2)
    damaged = run(tmp_path)
    assert (cached.stdout, cached.stderr) == (first.stdout, "")
    assert damaged.stdout == first.stdout
    assert "Error reading persistent compilation cache entry" in damaged.stderr
    path = next(iter(stored))
    path.unlink()
    os.mkfifo(path)
    blocked = run(tmp_path)
    assert blocked.stdout == first.stdout
    assert f"holds {path.name}, which is no file; compiled programs are not cached" in blocked.stderr


def test_an_option_that_xla_no_longer_has_costs_speed_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiling, "_CPU_OPTIONS", {"xla_cpu_option_of_the_past": ""})
    compiling.compiler_options.cache_clear()
    try:
        for _ in range(2):
            assert float(compiling.jit(lambda x: jnp.sin(x))(jnp.zeros(()))) == 0
        assert compiling.compiler_options() == {}
        err = capsys.readouterr().err
        assert err.count("has no option xla_cpu_option_of_the_past: steps take longer on CPUs\n") == 1
    finally:
        compiling.compiler_options.cache_clear()
