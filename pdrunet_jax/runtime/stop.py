"""Asked to stop: SIGTERM and SIGINT only set a flag, and the loop saves and leaves at its next step."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopFlag:
    """A context in which SIGTERM and SIGINT set a flag instead of ending the process; further signals change nothing.

    `if stop:` asks for the flag; `stop.signal` names the first signal. The earlier handlers come back on exit. Outside
    the main thread, where Python allows no handlers, the flag is only set by `request`.

    With `last`, the process ends with the context: signals that arrive after it are ignored, because all they could
    still do is to spoil the exit code.
    """

    def __init__(self, last: bool = False) -> None:
        self.signal: str | None = None
        self._last = last
        self._earlier: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._earlier[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, signal.SIG_IGN if self._last else handler)
        self._earlier.clear()

    def __bool__(self) -> bool:
        return self.signal is not None

    def ask(self) -> bool:
        """Whether to stop; `AgreedStop` asks the other processes here."""
        return bool(self)

    def request(self, name: str = "request") -> None:
        """Set the flag as a signal would."""
        self.signal = self.signal or name

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.request(signal.Signals(number).name)
