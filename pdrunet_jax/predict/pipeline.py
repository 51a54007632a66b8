"""Images side by side: read ahead, through the network one after the other, and written behind, in order.

The next images are decoded and the last ones encoded while the network works on one. What is written, and in which
order, is as if each image were finished before the next one was read.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Generic, NamedTuple, TypeVar

from pdrunet_jax.predict.engines.engine import Engine
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.malloc import cores

I = TypeVar("I")  # noqa: E741
G = TypeVar("G")
V = TypeVar("V")
C = TypeVar("C")

MOST_BYTES = 512 << 20
"""Memory of images that wait to be written; one may take more."""


class Stages(NamedTuple, Generic[I, G, V, C]):
    """The work on one item. The first three stages may raise `UserError`, which the last one gets to know."""

    read: Callable[[I], G]
    """In threads, a few items ahead."""
    compute: Callable[[G], V]
    """The network: one item after the other on each device."""
    compose: Callable[[I, G, V], C]
    """In threads."""
    write: Callable[[I, Callable[[], C]], None]
    """One item after the other, in order: takes a function that returns what was composed, or raises `UserError`."""
    weigh: Callable[[G], int]
    """Bytes that an item takes until it is written."""


def run_stages(stages: Stages[I, G, V, C], items: Iterable[I], engine: Engine, stop: Callable[[], bool]) -> None:
    """Pass each of `items` through the stages; once asked to stop, write what the network has computed, and return.

    An exception other than a `UserError` ends the run; what was computed before it is written.
    """
    count = cores()
    ahead = min(count, 4)
    with ExitStack() as stack:
        readers, composers, writer = (
            stack.enter_context(ThreadPoolExecutor(threads)) for threads in (ahead, max(count, 2), 1)
        )  # left in reverse order: what is being written, or composed for it, is finished
        waiting: deque[tuple[Future[None], int]] = deque()
        ended: list[I] = []  # the item whose writing ended the run

        def through(entry: tuple[I, Future[G]]) -> tuple[G, V]:
            given = entry[1].result()
            return given, stages.compute(given)

        def write(item: I, composed: Future[C]) -> None:
            if ended:
                return
            try:
                stages.write(item, composed.result)
            except BaseException:
                ended.append(item)
                raise

        def settle(most: int) -> None:
            """Wait until at most this many bytes, and items, are to be written; raises what ends the run."""
            while waiting and (
                waiting[0][0].done() or sum(size for _, size in waiting) > most or len(waiting) > 2 * count
            ):
                waiting[0][0].result()
                waiting.popleft()

        for (item, _), computed in engine.spread(through, _ahead(readers, stages.read, items, ahead)):
            if stop():
                break
            size = 0
            try:
                given, value = computed()
                size, composed = stages.weigh(given), composers.submit(stages.compose, item, given, value)
            except UserError as error:
                composed = Future()
                composed.set_exception(error)
            waiting.append((writer.submit(write, item, composed), size))
            settle(MOST_BYTES)
        settle(-1)


def _ahead(
    pool: ThreadPoolExecutor, read: Callable[[I], G], items: Iterable[I], count: int
) -> Iterator[tuple[I, Future[G]]]:
    """Each item with what becomes of it, read while the `count` items before it are worked on."""
    queue: deque[tuple[I, Future[G]]] = deque()
    try:
        for item in items:
            queue.append((item, pool.submit(read, item)))
            if len(queue) > count:
                yield queue.popleft()
        while queue:
            yield queue.popleft()
    finally:
        for _, future in queue:
            future.cancel()
