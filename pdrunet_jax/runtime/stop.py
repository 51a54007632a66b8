"""Stop requests: signals set a flag, and the training loop saves and exits at its next step."""

import signal
import threading
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that ask to stop: by a scheduler or `kill`, Ctrl-C, and a terminal that is closed."""
UNHEARD = "SIGPIPE"
"""Name of the request that a closed pipe makes, such as `| head`: nobody reads the output any more."""


class StopFlag:
    """Context in which `SIGNALS` set a flag instead of ending the process; further signals change nothing.

    The flag is the object's truth value; `signal` names the first signal. On exit the earlier handlers are restored or,
    with `last`, the signals are ignored from then on: the process is ending and they could only spoil its exit code.
    SIGHUP stays ignored under `nohup`. Outside the main thread, where Python allows no handlers, only `request` sets
    the flag.
    """

    def __init__(self, last: bool = False) -> None:
        self.signal: str | None = None
        self._last = last
        self._earlier: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._earlier[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, signal.SIG_IGN if self._last else handler)
        self._earlier.clear()

    def __bool__(self) -> bool:
        return self.signal is not None

    def ask(self) -> bool:
        """Whether to stop; `AgreedStop` overrides this to agree with the other processes."""
        return bool(self)

    def request(self, name: str = "request") -> None:
        """Set the flag as a signal would."""
        self.signal = self.signal or name

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.request(signal.Signals(number).name)
