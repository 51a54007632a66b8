"""One contender in a process of its own: told what to do on standard input, a line each, it answers with JSON.

`train COUNT` and `infer COUNT` time so many repetitions, `memory COUNT` says the highest resident memory of training.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable

from benchmarks.contenders import SIDES, Work, resident, resident_peak
from pdrunet_jax.runtime.malloc import configure_malloc, trim_malloc


def timed(function: Callable[[], None], count: int) -> list[float]:
    """Seconds of each of `count` calls."""
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return seconds


def main() -> None:
    """The process; its arguments are the framework, the variant and the work as JSON."""
    framework, variant, work = sys.argv[1:]
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not get between the answers
    if (framework == "jax" and variant != "naive") or "retained" in variant:
        configure_malloc()  # as every command of pdrunet_jax does
    started = time.perf_counter()
    if framework == "torch":
        importlib.import_module("torch")
    else:
        import jax

        from pdrunet_jax.runtime.compile import dispatch_in_turn

        dispatch_in_turn()  # as every command does
        jax.devices()
        importlib.import_module("pdrunet_jax.step")
    imported = time.perf_counter() - started
    baseline = resident()
    sides = SIDES[framework](variant, Work(**json.loads(work)))
    print(json.dumps({**sides.notes, "import_s": imported}), file=answers, flush=True)
    for line in sys.stdin:
        order, count = line.split()
        if order == "memory":
            trim_malloc()  # what compiling has left, as training does after its first step; PyTorch's likewise
            with resident_peak() as peak:
                timed(sides.train, int(count))
                answer: object = {"resident": peak() - baseline, "device": sides.device_memory()}
        else:
            answer = timed(sides.train if order == "train" else sides.infer, int(count))
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
