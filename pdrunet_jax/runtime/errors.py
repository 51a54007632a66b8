"""Exceptions with a message for the user, and their exit codes."""

import errno
import re
from collections.abc import Iterable

_FIXABLE = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY),
    *(errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO, errno.ENODEV),
}
"""Errors of the operating system about a path that the user can correct."""
_NO_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory", "failed to map segment", "Cannot allocate memory", "bad_alloc")
_NO_DEVICE = ("Unable to initialize backend", "Unknown backend", "No visible")

MOST_ALIKE = 10
"""Problems of one kind that a message lists."""

_NAMES = re.compile(r"\S*[\d/\\.]\S*(,? \S*[\d/\\.]\S*)*")  # words with a digit, a slash or a point


class UserError(Exception):
    """Invalid input that the user can fix: exit code 2, one message, no traceback.

    The message names the file or option and the remedy.
    """

    exit_code = 2


class RunError(Exception):
    """A failure in spite of valid input, such as a full disk: exit code 1, one message, no traceback."""

    exit_code = 1


class DataError(UserError):
    """All problems of a dataset, file or configuration, collected in one pass."""

    def __init__(self, what: str, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        lines = "\n".join(f"  - {line}" for line in _grouped(self.problems))
        super().__init__(f"{what}:\n{lines}")


def explained(error: BaseException) -> UserError | RunError | None:
    """The message for the user that an exception of Python, JAX or the system stands for; None if it is a bug."""
    text = str(error).strip()
    first = (text.splitlines() or [type(error).__name__])[0]
    if isinstance(error, UserError | RunError):
        return error
    if isinstance(error, FileNotFoundError) and error.errno and error.filename is None:
        return UserError("the current folder has been removed: change to another one")
    if isinstance(error, OSError):
        name = "" if error.filename is None else f"{error.filename}: "
        return (UserError if error.errno in _FIXABLE else RunError)(f"{name}{error.strerror or first}")
    if isinstance(error, MemoryError) or any(sign in text for sign in _NO_MEMORY):
        return RunError(f"memory is not sufficient ({first}): free some, raise the limit, or work on less at a time")
    if isinstance(error, RecursionError):
        return UserError("a file is nested too deeply; refused")
    if isinstance(error, UnicodeError):
        return UserError(_not_text(error))
    if isinstance(error, RuntimeError) and any(sign in text for sign in _NO_DEVICE):
        return UserError(f"JAX finds no device: {first}; set JAX_PLATFORMS=cpu to run on the CPU")
    if isinstance(error, RuntimeError) and text == "can't start new thread":
        return RunError("the system allows no more threads: raise the limit of processes or of memory (ulimit)")
    return None


def _not_text(error: UnicodeError) -> str:
    if isinstance(error, UnicodeEncodeError):
        part = error.object[max(0, error.start - 60) : error.end + 60]
        return f"the name {part!a} is not valid text; rename it in UTF-8"
    return f"a file that should be UTF-8 text is not: {error}"


def _grouped(problems: Iterable[str]) -> list[str]:
    """The problems, at most `MOST_ALIKE` of those that differ in names and numbers alone, and how many more there are.

    Kinds are in the order of their first problem, which is the one that may state the remedy.
    """
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        kinds.setdefault(_NAMES.sub("*", problem.partition("\n")[0][:500]), []).append(problem)
    lines = []
    for alike in kinds.values():
        lines += alike[:MOST_ALIKE]
        if more := len(alike) - MOST_ALIKE:
            lines += [f"and {more:,} more of this kind"] if more > 0 else []
    return lines
