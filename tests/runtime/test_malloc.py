"""The C library keeps freed memory: a repeated program takes no new pages."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from pdrunet_jax.runtime.malloc import configure_malloc
kept = configure_malloc() if sys.argv[1] == "keep" else False
from pdrunet_jax.runtime.compile import disable_async_dispatch
disable_async_dispatch()
import jax, jax.numpy as jnp
program = jax.jit(lambda x, w: (x @ w).T @ (x @ w))  # temporaries of 80 MB: more than glibc keeps by itself
x, w = jnp.ones((80_000, 8)), jnp.ones((8, 128))
faults = []
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    program(x, w).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(kept, sorted(faults[4:])[4])
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")


def run(mode: str, **environment: str) -> tuple[bool, int]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
    )
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


def test_a_repeated_program_takes_no_new_pages() -> None:
    kept, faults = run("keep")
    if not kept:
        pytest.skip("not glibc")
    _, before = run("leave")
    assert faults < before / 10


def test_the_heap_asks_for_huge_pages_now_and_after_giving_back() -> None:
    """The kernel marks memory that wants huge pages with "hg", whether or not it has any to give."""
    program = r"""
import re
from pathlib import Path
from pdrunet_jax.runtime import malloc
if not malloc.configure_malloc() or not malloc._may_reserve():
    print("skip")
for _ in range(2):
    block = bytearray(64 << 20)
    heap = [part for part in re.split(r"\n(?=[0-9a-f]+-)", Path("/proc/self/smaps").read_text()) if "[heap]" in part]
    largest = max(heap, key=lambda part: int(re.search(r"Rss: +([0-9]+)", part)[1]))
    print(int(re.search(r"Rss: +([0-9]+)", largest)[1]) > 60 << 10 and " hg" in largest)
    del block
    malloc.trim_malloc()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    if "skip" in done.stdout:
        pytest.skip("not glibc, or addresses are limited")
    assert done.stdout.split() == ["True", "True"]


def test_settings_of_the_environment_stay() -> None:
    kept, _ = run("keep", MALLOC_ARENA_MAX="4")
    assert not kept
