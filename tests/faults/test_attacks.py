"""Hostile files, links, limits and options for every command: no traceback, no hang, no harm elsewhere."""

import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import LONG, ROOT
from tests.support.live import Place, record

SEED = 0
SHORT = (1, 2, 4, 9, 11, 14, 23, 40, 42, 46, 84, 108)
"""Attacks of every sort: files, options, links, limits."""
NUMBERS = range(400) if LONG else SHORT


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="attacks-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.mark.skipif(sys.platform != "linux", reason="limits and capabilities of Linux")
def test_no_attack_on_any_command_crashes_it_or_writes_elsewhere(place: Place, folder: Path) -> None:
    spec = folder / "spec.json"
    spec.write_text(
        json.dumps({"folder": str(folder), "place": str(place.path), "seed": SEED, "numbers": list(NUMBERS)})
    )
    command = [sys.executable, "-m", "tests.support.attacks", str(spec)]
    result = subprocess.run(
        command, cwd=ROOT, env=place.environment, capture_output=True, text=True, check=False, timeout=3500
    )
    outcomes = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(outcomes) == len(NUMBERS), result.stderr[-3000:]
    assert [outcome for outcome in outcomes if outcome["faults"]] == [], json.dumps(
        [outcome for outcome in outcomes if outcome["faults"]], indent=1
    )
    codes = Counter(outcome["code"] for outcome in outcomes)
    record(
        "attacks",
        seed=SEED,
        attacks=len(outcomes),
        exit_codes={str(code): count for code, count in sorted(codes.items())},
        most_seconds=max(outcome["seconds"] for outcome in outcomes),
        most_mebibytes=max(outcome["mebibytes"] for outcome in outcomes),
    )
