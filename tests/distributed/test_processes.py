"""Start, exchange and end of several processes."""

import signal
import socket
import time
from contextlib import ExitStack

import pytest

from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.processes import Distributed, Group
from tests.support.together import Site, ends, free_port

EXCHANGE = """
import sys, jax, ml_dtypes, numpy as np
from pdrunet_jax.runtime import cli
from pdrunet_jax.runtime.processes import Distributed, join

def main():
    index = int(sys.argv[2])
    with join(Distributed(f"127.0.0.1:{sys.argv[1]}", 2, index), detect=False) as group:
        assert (group.index, group.count, group.is_main) == (index, 2, index == 0)
        assert group.gather(b"") == [b"", b""]
        values = [b"\\x00\\xff" * 3, b"x" * 100_000]
        assert group.gather(values[index]) == values
        assert group.broadcast(["Röntgen", "other"][index]) == "Röntgen"
        special = np.array([-0.0, np.nan, 1e-42, 1], np.float32)
        tree = {
            "a": special if index == 0 else np.zeros(4, np.float32), "b": np.full((3, 2), index, ml_dtypes.bfloat16),
            "c": np.bool_(index == 0), "d": np.full(3, index, np.int32), "e": np.zeros((0, 2)),
        }
        got = group.broadcast_arrays(tree)
        assert got["a"].tobytes() == special.tobytes()
        assert got["b"].shape == (3, 2) and got["b"].dtype == ml_dtypes.bfloat16 and not got["b"].any()
        assert got["c"] and got["c"].shape == () and not got["d"].any() and got["e"].shape == (0, 2)
        group.require_same("equal", "never")
        with group.main_first():
            group.log("main")
        group.require_same(f"differs in {index}", "make them equal")

cli.run(main)
"""


def test_processes_exchange_text_bytes_and_arrays_bit_for_bit(site: Site) -> None:
    port = free_port()
    with ExitStack() as stack:
        found = ends([stack.enter_context(site.start("-c", EXCHANGE, port, index)) for index in range(2)])
    assert [(code, err) for code, _, err in found] == [(2, "error: process 1 of 2: make them equal\n")] * 2
    assert ["main" in out for _, out, _ in found] == [True, False]


def test_a_single_process_is_a_group_of_one() -> None:
    group = Group()
    assert group.is_main
    assert group.gather(b"x") == [b"x"]
    assert group.broadcast("x") == "x"
    group.require_same("x", "never")
    group.wait()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"coordinator": "host:1"}, "--distributed.processes and --distributed.index are missing"),
        ({"processes": 2, "index": 0}, "--distributed.coordinator is missing"),
        ({"coordinator": "host:1", "processes": 2, "index": 2}, "--distributed.index 2: give 0 to 1"),
        ({"coordinator": "host:1", "processes": 2, "index": -1}, "--distributed.index -1"),
        ({"coordinator": "host:1", "processes": 0, "index": 0}, "--distributed.processes 0"),
        ({"coordinator": "host", "processes": 2, "index": 0}, "give HOST:PORT"),
        ({"coordinator": "host:port", "processes": 2, "index": 0}, "give HOST:PORT"),
        ({"coordinator": "host:65536", "processes": 2, "index": 0}, "give HOST:PORT"),
        ({"timeout": 0}, "--distributed.timeout 0"),
    ],
)
def test_incomplete_and_impossible_options_are_refused(options: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        Distributed(**options).wanted(detect=True)  # type: ignore[arg-type]


def test_a_signal_ends_the_wait_for_the_other_processes(site: Site) -> None:
    options = ["--distributed.coordinator", f"127.0.0.1:{free_port()}", "--distributed.processes", 2]
    process = site.train(site.path / "waiting", *options, "--distributed.index", 0)
    time.sleep(6)  # until it waits; an earlier signal ends it likewise
    process.send_signal(signal.SIGTERM)
    [(code, out, err)] = ends([process], timeout=60)
    assert (code, out, err) == (75, "", "")


@pytest.mark.parametrize("index", [0, 1])
def test_a_process_that_finds_no_other_says_so(site: Site, index: int) -> None:
    address = f"127.0.0.1:{free_port()}"
    options = ["--distributed.coordinator", address, "--distributed.processes", 2, "--distributed.index", index]
    [(code, _, err)] = ends([site.train(site.path / "lost", *options, "--distributed.timeout", 2)], timeout=60)
    assert code == 2
    assert err == (
        f"error: process {index} of 2: the processes did not find each other within 2 s: start all, and check that "
        f"they can reach --distributed.coordinator {address}\n"
    )


def test_a_coordinator_port_that_is_taken_is_named(site: Site) -> None:
    with socket.create_server(("", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        options = ["--distributed.coordinator", address, "--distributed.processes", 2, "--distributed.index", 0]
        [(code, _, err)] = ends([site.train(site.path / "taken", *options)], timeout=60)
    assert code == 2
    assert err == (
        f"error: process 0 of 2: cannot listen at --distributed.coordinator {address} (Address already in use); "
        "choose a free port\n"
    )


def test_without_a_cluster_the_options_that_are_needed_are_named(site: Site) -> None:
    [(code, _, err)] = ends([site.train(site.path / "nowhere", "--distributed")])
    assert code == 2
    assert err.count("\n") == 1
    assert "JAX detects no cluster" in err
    assert "--distributed.coordinator HOST:PORT --distributed.processes N --distributed.index I" in err
    assert not (site.path / "nowhere").exists()
