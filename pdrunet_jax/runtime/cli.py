"""Entry point `pdrunet`, and what all commands share: exit codes and error messages without a traceback.

Imports nothing heavy: `train` has to install its signal handlers before JAX loads.
"""

import argparse
import difflib
import errno
import importlib
import io
import os
import select
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from itertools import pairwise
from typing import Any, NoReturn

from pdrunet_jax.runtime.errors import RunError, UserError, explained
from pdrunet_jax.runtime.malloc import configure_malloc
from pdrunet_jax.runtime.stop import UNHEARD, StopFlag

STOPPED = 75
"""Exit code of a run that was stopped by a signal and saved its state (EX_TEMPFAIL of sysexits.h: try again later)."""

INTERRUPTED = 130
"""Exit code after Ctrl-C of a command that has nothing to save, as shells report it (128 + SIGINT)."""

BROKEN_PIPE = os.strerror(errno.EPIPE)

COMMANDS = {
    "train": "train a model, or resume a run",
    "compare": "train several networks on the same images and seeds, and compare their scores",
    "evaluate": "score a model on a dataset: metrics with intervals, report, comparison of two models",
    "predict": "segment images: masks, probabilities, overlays, contours",
    "convert": "convert weights or a whole training run between PyTorch and JAX",
    "export": "export a model to ONNX, StableHLO, a page for browsers, or the Hugging Face Hub",
    "data": "import, check and split datasets; generate synthetic X-rays",
    "weights": "list the weights that come with the package, and what they are for",
}


def main() -> NoReturn:
    """Run the command named by the first argument, as `python -m pdrunet_jax.COMMAND` does."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command in COMMANDS:
        sys.argv[:2] = [f"pdrunet {command}"]
        run(lambda: importlib.import_module(f"pdrunet_jax.{command}.__main__").main())
    if command == "--version":
        print(f"pdrunet {metadata.version('pdrunet-jax')}")
        sys.exit(0)
    if command in ("-h", "--help"):
        print(_usage())
        sys.exit(0)
    if not command:
        print(_usage(), file=sys.stderr)
        sys.exit(2)
    close = difflib.get_close_matches(command, COMMANDS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(COMMANDS)}"
    print(f"error: unknown command {command!r}: {hint}", file=sys.stderr)
    sys.exit(2)


def program(command: str) -> str:
    """How `command` was started, for its usage line: `pdrunet COMMAND` or `python -m pdrunet_jax.COMMAND`."""
    typed = f"pdrunet {command}"
    return typed if sys.argv[0] == typed else f"python -m pdrunet_jax.{command}"


def first_value(arguments: Sequence[str], option: str) -> str | None:
    """The value of `option` before `arguments` are parsed, for an option that determines the defaults of others.

    The last one if it is repeated, as the parser takes it; None if it is absent.
    """
    found = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    found.add_argument(option, dest="value", nargs="?")
    value: str | None = found.parse_known_args(list(arguments))[0].value
    return value


def printable(text: str) -> str:
    """Escape control characters in `text`: a file name must not drive the terminal."""
    return "".join(letter if letter.isprintable() or letter in " \n\t" else ascii(letter)[1:-1] for letter in text)


def run(command: Callable[[], int | None]) -> NoReturn:
    """Run `command` and exit with the code it returns.

    `UserError` exits with 2 and `RunError` with 1, each printing only its message to standard error; so do the
    exceptions that `errors.explained` knows. Any other exception is a bug and keeps its traceback. If lines of output
    were lost, the exit code is 1 instead of 0.
    """
    configure_malloc()  # before any library starts its threads
    output = guard_output()
    try:
        _refuse_empty(sys.argv[1:])
        code = command() or 0
    except SystemExit as done:  # of --help, or of an option that cannot be parsed
        if done.code is not None and not isinstance(done.code, int):
            raise
        code = done.code or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    except Exception as error:
        known = explained(error)
        if known is None:
            raise
        print(f"error: {printable(str(known))}", file=sys.stderr)
        code = known.exit_code
    if output.lost and code == 0:
        if output.lost != BROKEN_PIPE:  # `| head` has read all that it wants
            print(f"error: standard output cannot be written ({output.lost}); lines are missing", file=sys.stderr)
        code = 1
    sys.exit(code)


def _refuse_empty(arguments: Sequence[str]) -> None:
    """Raise `UserError` for an empty argument: pathlib would take it for the current folder.

    The value of a setting (`--section.name`) may be empty.
    """
    for before, argument in pairwise(["", *arguments]):
        if not argument and "." not in before:
            name = f'{before} ""' if before.startswith("--") else 'an argument, "",'
            raise UserError(f"{name} is empty; is a variable of the shell unset?")


class Output(io.FileIO):
    """A standard stream whose writes never fail. What cannot be written is dropped, from the first failure on.

    With a `stop` flag, a pipe that nobody reads any more asks to stop, and once the flag is set nothing waits for a
    stalled reader.
    """

    lost = ""
    """Why the first write failed; empty if none did."""
    stop: StopFlag | None = None

    def write(self, data: Any) -> int:
        """Write some of `data`; returns how many bytes need no further attempt."""
        try:
            while not self.lost and not select.select([], [self], [], 0.2)[1]:
                if self.stop:
                    return len(data)
            # A pipe that can be written to takes this much without waiting.
            return len(data) if self.lost else super().write(data[: select.PIPE_BUF]) or 0
        except OSError as error:
            self.lost = error.strerror or str(error)
        if self.stop is not None:
            self._tell(self.stop)
        return len(data)

    def require_complete(self, code: int, done: str) -> int:
        """Return the exit code; raise `RunError` if it is 0 and lines were lost. `done` says what is finished."""
        if self.lost and code == 0:
            raise RunError(f"{done}, but lines are missing on standard output ({self.lost})")
        return code

    def _tell(self, stop: StopFlag) -> None:
        gone = self.lost == BROKEN_PIPE
        if gone:
            stop.request(UNHEARD)
        if self.fileno() != 2:
            what = "stopping, with everything saved" if gone else "training continues"
            print(f"warning: standard output cannot be written ({self.lost}); {what}", file=sys.stderr)


def guard_output(stop: StopFlag | None = None) -> Output:
    """Let no print fail from here on, nor wait for a reader once `stop` is set; returns the new standard output.

    Letters that the stream's encoding lacks are written as escapes.
    """
    for name in ("stderr", "stdout"):
        stream = getattr(sys, name)
        usable, in_memory = _kind_of(stream)
        if not usable or in_memory:
            raw = Output(os.open(os.devnull, os.O_WRONLY), "w", closefd=False)
        else:
            raw = Output(stream.fileno(), "w", closefd=False)
        raw.stop = stop
        if not in_memory:
            encoding = stream.encoding if usable else "utf-8"
            text = io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=True)
            setattr(sys, name, text)
    return raw


def _kind_of(stream: Any) -> tuple[bool, bool]:
    """Whether a standard stream can be used, and whether it is no file: whoever imports this package may replace it.

    Python sets a stream to None that whoever started the command has closed.
    """
    try:
        return stream is not None and bool(os.fstat(stream.fileno())), False
    except io.UnsupportedOperation:
        return True, True
    except OSError:
        return False, False


def _usage() -> str:
    commands = "\n".join(f"    {name:<10}{text}" for name, text in COMMANDS.items())
    return (
        "usage: pdrunet COMMAND [OPTIONS]\n\nPDR-UNet: bone segmentation in X-ray images.\n\n"
        f"commands:\n{commands}\n\n"
        "pdrunet COMMAND --help lists the options of a command; pdrunet --version prints the version."
    )
