"""`python -m parity_tests.support.walk`: agreement, and the first value that differs."""

from pathlib import Path

import pytest

from parity_tests.support import walk
from parity_tests.support.case import Case
from parity_tests.support.cases import state_of
from pdrunet_jax.model import layers
from pdrunet_jax.model.files import write_safetensors
from pdrunet_jax.runtime.errors import RunError


@pytest.fixture
def weights(tmp_path: Path) -> str:
    path = tmp_path / "weights.safetensors"
    write_safetensors(path, state_of(Case(shortcut="conv1", outputs=2, dtype="float32")), {"shortcut": "conv1"})
    return str(path)


def test_a_checkpoint_walks_through_both_networks(weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    walk.main([weights, "--size", "24"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("std_block.first ")
    assert lines[-1] == "all 66 values agree within 1e-11"


def test_the_first_value_that_differs_is_named(
    weights: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "EPSILON", 1e-3)
    with pytest.raises(RunError, match=r"the first is std_block\.bnorm1"):
        walk.main([weights, "--size", "24"])
    assert "std_block.bnorm1" in next(line for line in capsys.readouterr().out.splitlines() if "differs" in line)
