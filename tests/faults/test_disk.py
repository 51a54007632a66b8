"""Disks that fill up or become read-only during each kind of write, on small file systems mounted for the test."""

import json
import shutil
import subprocess
import sys

import pytest

from tests.support import ROOT
from tests.support.live import Place, assert_same_run, record

NAMED = {
    "checkpoint": "checkpoints/",
    "metrics": "metrics.jsonl",
    "weights": "best.safetensors",
    "report": "report.html",
    "read-only": "lock",
}
CASES = [("checkpoint", "weights"), *(pytest.param((kind,), marks=pytest.mark.stress) for kind in NAMED)]


def may_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    command = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not may_mount(), reason="no mount namespaces here; test_checkpoint.py limits the size of files")
@pytest.mark.parametrize("kinds", CASES, ids=" then ".join)
def test_a_full_disk_costs_nothing_that_was_saved_and_the_run_ends_the_same_once_there_is_room(
    place: Place, kinds: tuple[str, ...]
) -> None:
    program = [sys.executable, str(ROOT / "tests/support/full_disk.py"), str(place.path), *kinds]
    command = ["unshare", "--map-root-user", "--mount", *program]
    result = subprocess.run(command, env=place.environment, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout)
    name = "-".join(kinds)
    for kind, (code, message) in seen["failed"].items():
        assert code == 1
        assert message.startswith("error: ")
        assert message.count("\n") == 1  # one message, no traceback
        assert f"small-{name}/{NAMED[kind]}" in message
        assert any(reason in message for reason in ("No space left", "Read-only", "is the disk full?"))
    assert seen["again"].startswith("error: ")
    assert seen["again"].count("\n") == 1
    assert seen["kept"]
    assert seen["verified"] == 0
    assert seen["resumed"] == [0, ""]
    assert_same_run(place.path / f"after-{name}", place.undisturbed)
    for kind, (code, message) in seen["failed"].items():
        message = message.strip().replace(str(place.path), "")
        record(f"full disk: {kind}", exit=code, resumed_exactly=True, message=message)
