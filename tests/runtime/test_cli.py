"""The `pdrunet` entry point: dispatch, help, version, exit codes."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from pdrunet_jax.runtime import cli
from pdrunet_jax.runtime.errors import explained

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
    assert "choose one of train, compare, evaluate," in pdrunet("xyz").stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--workdir", ""], '--workdir "" is empty'), (["", "x"], "an argument"), (["--data.root", ""], None)],
)
def test_an_empty_argument_is_no_folder(
    arguments: list[str], words: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "configure_malloc", lambda: False)
    monkeypatch.setattr(sys, "argv", ["pdrunet train", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: 0)
    assert stopped.value.code == (2 if words else 0)
    assert (words or "") in capsys.readouterr().err


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


def test_exceptions_of_python_jax_and_the_system_are_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raised(action: Callable[[], object]) -> tuple[int, str]:
        with pytest.raises(BaseException) as caught:  # noqa: PT011
            action()
        known = explained(caught.value)
        assert known is not None
        return known.exit_code, str(known)

    def deep() -> object:
        return deep()

    assert raised(lambda: Path("/nowhere/file").read_bytes()) == (2, "/nowhere/file: No such file or directory")
    assert raised(lambda: Path("/").read_bytes()) == (2, "/: Is a directory")
    assert raised(lambda: Path("/dev/full").write_bytes(b"x")) == (1, "No space left on device")
    assert raised(lambda: Path("x" * 300).read_bytes())[1].endswith(": File name too long")
    assert raised(lambda: bytearray(1 << 62))[1].startswith("memory is not sufficient")
    assert raised(deep) == (2, "a file is nested too deeply; refused")
    code, message = raised(lambda: "a\udcffb.png".encode())
    assert (code, message) == (2, r"the name 'a\udcffb.png' is not valid text; rename it in UTF-8")
    assert explained(KeyError("a bug")) is None
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert raised(os.getcwd) == (2, "the current folder has been removed: change to another one")


def test_a_backend_that_is_not_there_is_named() -> None:
    program = "from pdrunet_jax.runtime import cli; import jax; cli.run(lambda: jax.numpy.zeros(1) and None)"
    environment = {**os.environ, "JAX_PLATFORMS": "tpu"}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: JAX finds no device: Unable to initialize backend 'tpu'")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("shell", "code", "message"),
    [
        ("> /dev/full", 1, "error: standard output cannot be written (No space left on device); lines are missing\n"),
        ("| head -c 1 > /dev/null; exit ${PIPESTATUS[0]}", 1, ""),
        (">&-", 0, ""),
    ],
    ids=["full", "head", "closed"],
)
def test_output_that_cannot_be_written(shell: str, code: int, message: str) -> None:
    program = "from pdrunet_jax.runtime import cli; cli.run(lambda: print('Kn\u00f6chel \\udcff ' * 100000))"
    command = ["bash", "-c", f'"$0" -c "$1" {shell}', sys.executable, program]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (code, message)
