"""Images are read ahead and written behind, and nobody can tell from the results."""

import threading
import time

import pytest

from pdrunet_jax.model.sides import Mirror
from pdrunet_jax.predict import pipeline
from pdrunet_jax.predict.engines.engine import Engine, Facts
from pdrunet_jax.predict.pipeline import Stages, run_stages
from pdrunet_jax.runtime.errors import RunError, UserError

FACTS = Facts(1, 1, False, None, "stretch", None, Mirror(), 1, 1, True)


class Recorded:
    """Stages that record what happens, with different durations."""

    def __init__(self, *, slow: float = 0.0) -> None:
        self.written: list[str] = []
        self.computed: list[int] = []
        self.most = 0
        self.under_way = 0
        self.slow = slow
        self._lock = threading.Lock()

    def read(self, item: int) -> int:
        with self._lock:
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        if item == 3:
            raise UserError("3 is not an image")
        return item

    def compute(self, given: int) -> int:
        self.computed.append(given)
        if given == 13:
            raise RunError("NaN")
        return given

    def compose(self, item: int, given: int, value: int) -> str:
        time.sleep(0.02 * (item % 3))  # the later one is ready first
        return f"{value}"

    def write(self, item: int, composed: object) -> None:
        time.sleep(self.slow)
        try:
            self.written.append(composed())  # type: ignore[operator]
        except UserError:
            self.written.append(f"no {item}")
        with self._lock:
            self.under_way -= 1

    def run(self, count: int, *, stop: object = lambda: False, weight: int = 1) -> None:
        stages = Stages(self.read, self.compute, self.compose, self.write, lambda given: weight)
        run_stages(stages, range(count), Engine("jax", "float32", FACTS), stop)  # type: ignore[arg-type]


def test_results_are_written_in_order_and_a_broken_image_in_its_place():
    done = Recorded()
    done.run(9)
    assert done.written == ["0", "1", "2", "no 3", "4", "5", "6", "7", "8"]


def test_what_was_computed_before_a_failure_is_written_and_nothing_after_it():
    done = Recorded(slow=0.01)
    with pytest.raises(RunError, match="NaN"):
        done.run(30)
    assert done.written == [f"no {item}" if item == 3 else f"{item}" for item in range(13)]
    assert max(done.computed) == 13


def test_a_failure_to_write_ends_the_run_at_once():
    done = Recorded()

    def full(item: int, composed: object) -> None:
        if item == 4:
            raise RunError("the disk is full")
        done.write(item, composed)

    stages = Stages(done.read, done.compute, done.compose, full, lambda given: 1)
    with pytest.raises(RunError, match="full"):
        run_stages(stages, range(200), Engine("jax", "float32", FACTS), lambda: False)
    assert done.written == ["0", "1", "2", "no 3"]
    assert len(done.computed) < 100


def test_a_run_that_is_asked_to_stop_writes_what_was_computed():
    done = Recorded(slow=0.02)
    done.run(200, stop=lambda: len(done.written) >= 5)
    assert [text.split()[-1] for text in done.written] == [f"{item}" for item in range(len(done.written))]
    assert 5 <= len(done.written) < 100
    assert len(done.written) == len(done.computed) + 1  # item 3 is not computed


def test_large_images_wait_for_those_before_them(monkeypatch):
    monkeypatch.setattr(pipeline, "MOST_BYTES", 100)
    small, large = Recorded(slow=0.01), Recorded(slow=0.01)
    small.run(13)
    large.run(13, weight=1000)
    assert large.most < small.most
