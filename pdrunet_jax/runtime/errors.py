"""Exceptions with a message for the user, and their exit codes."""

from collections.abc import Iterable


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
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"{what}:\n{lines}")
