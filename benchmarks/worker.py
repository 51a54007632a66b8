"""Worker process of `benchmarks.steps`: one contender, which reads orders from stdin and answers in JSON, a line each.

`train COUNT` and `infer COUNT` time COUNT repetitions; `memory COUNT` reports the peak memory of COUNT training steps.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable

from benchmarks.contenders import SIDES, Work, resident, resident_peak
from pdrunet_jax.runtime.malloc import configure_malloc, trim_malloc


def timed(function: Callable[[], None], count: int) -> list[float]:
    """Time each of `count` calls, in seconds."""
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return seconds


def main() -> None:
    """Serve orders; the arguments are framework, variant, and the work as JSON."""
    framework, variant, work = sys.argv[1:]
    answers, sys.stdout = sys.stdout, sys.stderr  # keeps library output out of the answers
    if (framework == "jax" and variant != "naive") or "retained" in variant:
        configure_malloc()  # as all our commands do
    started = time.perf_counter()
    if framework == "torch":
        importlib.import_module("torch")
    else:
        import jax

        from pdrunet_jax.runtime.compile import disable_async_dispatch

        disable_async_dispatch()  # likewise
        jax.devices()
        importlib.import_module("pdrunet_jax.train.step")
    imported = time.perf_counter() - started
    baseline = resident()
    sides = SIDES[framework](variant, Work(**json.loads(work)))
    print(json.dumps({**sides.notes, "import_s": imported}), file=answers, flush=True)
    for line in sys.stdin:
        order, count = line.split()
        if order == "memory":
            trim_malloc()  # frees what compilation left over, as training does after its first step
            with resident_peak() as peak:
                timed(sides.train, int(count))
                answer: object = {"resident": peak() - baseline, "device": sides.device_memory()}
        else:
            answer = timed(sides.train if order == "train" else sides.infer, int(count))
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
