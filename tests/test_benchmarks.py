"""The commands of `python -m benchmarks` exist, accept their options, and each write a file of their own."""

import importlib
import importlib.util
from pathlib import Path

import pytest
import tyro

from benchmarks import output
from benchmarks.__main__ import cpu
from benchmarks.gpu import Options, Part, page, parts, run


def test_planned_commands_parse_and_write_different_files() -> None:
    kept, plan = [], cpu()
    for name, *arguments in plan:
        if arguments:
            kept.append(tyro.cli(importlib.import_module(name).Options, args=arguments).output)
        else:
            assert importlib.util.find_spec(name)  # the plots, which need matplotlib
    assert len(kept) == len(set(kept)) == len(plan) - 1
    assert all(file.parent == Path("benchmarks/results") and file.suffix == ".json" for file in kept)


def test_the_parts_for_a_gpu_parse() -> None:
    planned = parts(Options(output=Path("results")))
    assert len({part.title for part in planned}) == len(planned)
    for part in planned:
        name, *arguments = part.command
        if name.startswith("benchmarks."):
            assert tyro.cli(importlib.import_module(name).Options, args=arguments).output.parent == Path("results")


def test_a_part_that_is_cut_off_keeps_what_it_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_part.py").write_text("import time\nprint('| a |\\n|---|', flush=True)\ntime.sleep(60)\n")
    monkeypatch.chdir(tmp_path)
    result = run(Part("Slow", ["slow_part"], 1), 3)
    assert (result["status"], result["output"]) == ("cut off", "| a |\n|---|\n")
    assert "## Slow" in page("a card", [result])


def test_results_replace_those_in_the_named_file(tmp_path: Path) -> None:
    file = tmp_path / "new" / "result.json"
    output.write({"a": 1}, file)
    output.write({"a": 2}, file)
    assert file.read_text(encoding="utf-8") == '{\n "a": 2\n}\n'
