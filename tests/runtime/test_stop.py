"""Signals set a flag; nothing else happens, however many there are."""

import os
import signal
import subprocess
import sys

import pytest

from pdrunet_jax.runtime.stop import StopFlag

LOOP = """
import time
from pdrunet_jax.runtime.stop import StopFlag
with StopFlag() as stop:
    print("ready", flush=True)
    while not stop:
        time.sleep(0.01)
    print("stopping", flush=True)
    time.sleep(0.5)
    print(stop.signal, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
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
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] != before
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_no_signal_no_stop() -> None:
    with StopFlag() as stop:
        assert not stop
    stop.request()
    assert stop
    assert stop.signal == "request"
