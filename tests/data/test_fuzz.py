"""Damaged files of every kind are read or refused: no traceback, no hang, no more than 2 GiB."""

import os
import re
import subprocess
import sys

import pytest

from tests.support import ROOT


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.stress)])
def test_damaged_files_are_read_or_refused_but_never_crash(count: int) -> None:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.support.fuzz", str(count), "0"],
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
        cwd=ROOT,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-6000:]
    outcomes = re.findall(r"'read': (\d+), 'refused': (\d+)", result.stdout)
    assert len(outcomes) == 7
    assert sum(int(number) for pair in outcomes for number in pair) >= 7 * count
    assert all(int(read) and int(refused) for read, refused in outcomes), result.stdout
