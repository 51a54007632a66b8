"""The commands of `python -m benchmarks` exist, accept their options, and each write a file of their own."""

import importlib
import importlib.util
from pathlib import Path

import pytest
import tyro

from benchmarks import output
from benchmarks.__main__ import cpu, gpu

PLANS = {"cpu": cpu(), "gpu": gpu()}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_planned_commands_parse_and_write_different_files(plan: list[list[str]]) -> None:
    kept = []
    for name, *arguments in plan:
        if arguments:
            kept.append(tyro.cli(importlib.import_module(name).Options, args=arguments).output)
        else:
            assert importlib.util.find_spec(name)  # the plots, which need matplotlib
    assert len(kept) == len(set(kept)) == len(plan) - 1
    assert all(file.parent == Path("benchmarks/results") and file.suffix == ".json" for file in kept)


def test_results_replace_those_in_the_named_file(tmp_path: Path) -> None:
    file = tmp_path / "new" / "result.json"
    output.write({"a": 1}, file)
    output.write({"a": 2}, file)
    assert file.read_text(encoding="utf-8") == '{\n "a": 2\n}\n'
