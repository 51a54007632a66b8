"""Precision settings of the session, and the error budget printed at its end."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
import torch

from parity_tests.support import report, torch_side
from parity_tests.support.budget import Budget

REPORT = Path(__file__).parent / "report" / "parity_report.json"

LONGEST = ["test_network.py", "test_training.py", "test_prove.py", "test_execution_paths.py"]
"""They come first, so that no worker is left with one of them at the end."""

SETTINGS = {
    "jax_enable_x64": True,  # float32 cases name their dtype
    "jax_default_matmul_precision": "highest",  # GPUs would convolve in TF32, with errors of 1e-2
    "jax_numpy_rank_promotion": "raise",
}

_BUDGET = pytest.StashKey[Budget]()
_DEVICES = pytest.StashKey[dict[str, str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--parity-report",
        type=Path,
        default=REPORT,
        help=f"write the error budget to this JSON file, and a page next to it with the suffix .html ({REPORT})",
    )
    parser.addoption(
        "--torch-process",
        action="store_true",
        help="run PyTorch in a separate process, on a GPU if it finds one; the default when JAX runs on a GPU",
    )


os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave GPU memory to the other processes


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:  # a worker process: the main one reports
        output["parity"] = {
            "budget": session.config.stash[_BUDGET].as_dict(),
            "devices": session.config.stash.get(_DEVICES, {}),
            "measured here": Budget.measured_here,
        }


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    parity = getattr(node, "workeroutput", {}).get("parity")
    if parity:
        node.config.stash[_BUDGET].merge(parity["budget"])
        node.config.stash[_DEVICES] = parity["devices"] or node.config.stash.get(_DEVICES, {})
        Budget.measured_here = parity["measured here"]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_BUDGET] = Budget()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {Path(__file__).with_name(name): place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.fixture(scope="package", autouse=True)
def settings(pytestconfig: pytest.Config) -> Iterator[None]:
    """Switch both frameworks to their most exact and deterministic mode."""
    cache = getattr(pytestconfig, "cache", None)  # absent under `-p no:cacheprovider`
    if jax.config.jax_compilation_cache_dir is None and cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    deterministic = torch.are_deterministic_algorithms_enabled()
    threads = torch.get_num_threads()
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    for name, value in SETTINGS.items():
        jax.config.update(name, value)
    torch_side.exact()
    theirs = "CPU"
    if jax.default_backend() != "cpu" or pytestconfig.getoption("--torch-process", False):
        theirs = torch_side.own_process() + ", in a separate process"
    # Errors differ on other devices; there the standard's tolerances apply.
    Budget.measured_here = jax.default_backend() == "cpu" and theirs.startswith("CPU")
    pytestconfig.stash[_DEVICES] = {"JAX": jax.devices()[0].device_kind, "PyTorch": theirs}
    yield
    torch_side.end_process()
    for name, value in before.items():
        jax.config.update(name, value)
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32


@pytest.fixture(scope="session")
def budget(pytestconfig: pytest.Config) -> Budget:
    """Checks comparisons against their tolerances and records the measured errors."""
    return pytestconfig.stash[_BUDGET]


@pytest.fixture
def caught(budget: Budget, request: pytest.FixtureRequest) -> Callable[..., str]:
    """Run a comparison that must fail, with a budget of its own, and record which check failed."""

    def run(comparison: Callable[..., None], *arguments: Any) -> str:
        with pytest.raises(AssertionError) as failure:
            comparison(Budget(), *arguments)
        message = str(failure.value)
        name = request.node.name.removeprefix("test_").replace("_", " ")
        budget.controls[name] = message.splitlines()[0]
        return message

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    budget = config.stash.get(_BUDGET, None)
    if budget is None or not budget.rows:
        return
    devices = config.stash.get(_DEVICES, {})
    terminalreporter.section("error budget, JAX against PyTorch")
    for line in budget.lines():
        terminalreporter.write_line(line)
    path = config.getoption("--parity-report", REPORT)
    page = report.write(path, budget, devices)
    if path == REPORT:  # generated in the source tree: keep it out of version control
        (path.parent / ".gitignore").write_text("*\n", encoding="utf-8")
    terminalreporter.write_line(f"written to {path} and {page}")
