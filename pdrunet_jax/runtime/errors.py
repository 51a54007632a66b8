"""The exceptions a user may meet, and the exit code that each one stands for."""

from collections.abc import Iterable


class UserError(Exception):
    """The input is wrong and the user can mend it: exit code 2, one message, no traceback.

    The message names the file or the option and says what to do.
    """

    exit_code = 2


class RunError(Exception):
    """The work could not be finished although the input was right: exit code 1."""

    exit_code = 1


class DataError(UserError):
    """Everything that is wrong with a dataset, found in one pass."""

    def __init__(self, what: str, problems: Iterable[str]) -> None:
        self.what = what
        self.problems = tuple(problems)
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"{what}:\n{lines}")
