"""What every command shares: exit codes, and one message instead of a traceback for bad input."""

import sys
from collections.abc import Callable
from typing import NoReturn

from pdrunet_jax.runtime.errors import RunError, UserError
from pdrunet_jax.runtime.malloc import configure_malloc

STOPPED = 75
"""Exit code of a run that was asked to stop, and saved (EX_TEMPFAIL of sysexits.h: try again later)."""


def run(command: Callable[[], int | None]) -> NoReturn:
    """Run `command` and leave the process with its exit code.

    A `UserError` leaves with 2 and a `RunError` with 1, each with its message alone on standard error; any other
    exception is a defect of ours and keeps its traceback.
    """
    configure_malloc()  # before any library starts its threads
    try:
        code = command()
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader of our output went away, e.g. `| head`
        sys.stderr.close()
        sys.exit(1)
    sys.exit(code or 0)
