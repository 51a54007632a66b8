"""The `pdrunet` entry point: dispatch, help, version, exit codes."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from pdrunet_jax.runtime import cli

ENTRY = [sys.executable, "-c", "from pdrunet_jax.runtime.cli import main; main()"]


def pdrunet(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*ENTRY, *arguments], capture_output=True, text=True, check=False, cwd=cwd)


def test_help_lists_every_command_and_version_prints_it() -> None:
    shown = pdrunet("--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert all(f"    {command} " in shown.stdout for command in cli.COMMANDS)
    version = pdrunet("--version")
    assert (version.returncode, version.stdout) == (0, f"pdrunet {metadata.version('pdrunet-jax')}\n")


def test_every_command_is_a_package_that_can_be_run() -> None:
    package = Path(cli.__file__).parents[1]
    assert {path.parent.name for path in package.glob("*/__main__.py")} == set(cli.COMMANDS)


def test_no_command_or_an_unknown_one_exits_with_2() -> None:
    bare = pdrunet()
    assert (bare.returncode, bare.stdout) == (2, "")
    assert "usage: pdrunet COMMAND" in bare.stderr
    unknown = pdrunet("evalute")
    assert unknown.returncode == 2
    assert unknown.stderr == "error: unknown command 'evalute': did you mean evaluate?\n"
    assert "choose one of train, evaluate," in pdrunet("xyz").stderr


def test_a_command_gets_its_arguments_and_errors_keep_their_exit_code(tmp_path: Path) -> None:
    result = pdrunet("train", "--verify", str(tmp_path / "none"))
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "none" in result.stderr


def test_the_entry_point_loads_nothing_heavy() -> None:
    program = "import sys, pdrunet_jax.runtime.cli; print(sys.modules.keys() & {'jax', 'numpy', 'torch', 'tyro'})"
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert result.stdout == "set()\n"


def test_the_usage_line_says_how_the_command_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pdrunet train"])
    assert cli.program("train") == "pdrunet train"
    assert cli.program("data") == "python -m pdrunet_jax.data"
    monkeypatch.setattr(sys, "argv", ["/somewhere/pdrunet_jax/train/__main__.py"])
    assert cli.program("train") == "python -m pdrunet_jax.train"
