"""Signals set a flag; nothing else happens, however many there are."""

import os
import signal
import subprocess
import sys

import pytest

from pdrunet_jax.runtime.stop import SIGNALS, StopFlag

LOOP = """
import signal, time
from pdrunet_jax.runtime.stop import SIGNALS, StopFlag
for number in SIGNALS:  # whoever started the tests may have them ignored: nohup, or a shell's background
    signal.signal(number, signal.SIG_DFL)
with StopFlag() as stop:
    print("ready", flush=True)
    while not stop:
        time.sleep(0.01)
    print("stopping", flush=True)
    time.sleep(0.5)
    print(stop.signal, flush=True)
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_two_signals_in_a_row_end_the_loop_without_a_traceback(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LOOP], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == "stopping\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, f"{number.name}\n", "")


def test_the_earlier_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_no_signal_no_stop() -> None:
    with StopFlag() as stop:
        assert not stop
    stop.request()
    assert stop
    assert stop.signal == "request"


def test_under_nohup_a_closed_terminal_is_ignored() -> None:
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopFlag() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop
    finally:
        signal.signal(signal.SIGHUP, earlier)
