"""Damaged files of every kind are read or refused: no traceback, no hang, no more than 1 GiB."""

import os
import re
import subprocess
import sys

import pytest

from tests.support import ROOT


@pytest.mark.timeout(1600)
@pytest.mark.parametrize(
    ("module", "kinds", "count"),
    [
        ("fuzz", 7, 100),
        ("fuzz_importers", 12, 20),
        pytest.param("fuzz", 7, 2000, marks=pytest.mark.stress),
        pytest.param("fuzz_importers", 12, 2000, marks=pytest.mark.stress),
    ],
)
def test_damaged_files_are_read_or_refused_but_never_crash(module: str, kinds: int, count: int) -> None:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-m", f"tests.support.{module}", str(count), "0"],
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
        cwd=ROOT,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-6000:]
    outcomes = re.findall(r"'read': (\d+), 'refused': (\d+)", result.stdout)
    assert len(outcomes) == kinds
    assert sum(int(number) for pair in outcomes for number in pair) >= kinds * count
    assert all(int(refused) and (int(read) or count < 100) for read, refused in outcomes), result.stdout
