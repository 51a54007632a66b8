"""The parity levels of any pair: each compares a Flax module with its PyTorch original, and names the likely cause.

    PAIR = port("my network", flax=..., torch=..., inputs=..., flax_loss=..., torch_loss=...)
    prove(PAIR, Budget(ours=False))

`python -m parity_tests.support.prove MODULE:PAIR` does the same from the command line.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from parity_tests.support import jax_training, torch_side, torch_training
from parity_tests.support.budget import Budget, DifferenceError
from parity_tests.support.case import Arrays, Pass, Trajectory, follow
from parity_tests.support.compare import (
    compare_buffers,
    compare_gradients,
    compare_outputs,
    compare_trajectories,
    compare_updates,
    largest,
    relative,
)
from parity_tests.support.diagnose import Trial, diagnose, in_forward_pass, in_training, in_updates, of_scale
from parity_tests.support.imitate import Change
from parity_tests.support.jax_side import How, is_buffer, make_jax_pass
from parity_tests.support.pair import Pair
from parity_tests.support.torch_side import on_torch
from pdrunet_jax.config import OptimConfig
from pdrunet_jax.convert.training import from_torch, to_torch

PASSES = 5
UPDATES = 100
STEPS = 50


def forward(pair: Pair, train: bool, numbers: Sequence[int] = (0,), how: How = "compiled", loss: bool = False) -> Pass:
    """The last of several passes of the Flax module, each on another batch; with `loss`, with all gradients."""
    batches = [pair.batch(number) for number in numbers]
    target = batches[-1].target
    target = jax.numpy.asarray(target) if isinstance(target, np.ndarray) else target
    objective = (lambda output: pair.flax_loss(output, target)) if loss else None
    run = make_jax_pass(pair.flax.build(pair.arrays), train=train, loss=objective, how=how, half=pair.flax)
    return [run(batch.images, batch.masks) for batch in batches][-1]


def original(
    pair: Pair, train: bool, numbers: Sequence[int] = (0,), loss: bool = False, changes: Sequence[Change] = ()
) -> Pass:
    """The last of several passes of the PyTorch original, which imitates the mistakes of `changes`."""
    batches = [pair.batch(number) for number in numbers]
    return on_torch(torch_side.network_pass, pair.torch, pair.arrays, batches, train, loss, list(changes))


def walk(pair: Pair, train: bool = False) -> dict[str, float]:
    """The relative difference of every activation and of the output, in the order of the forward pass."""
    got, want = forward(pair, train), original(pair, train)
    errors = {name: relative(got.activations[name], array) for name, array in want.activations.items()}
    return errors if pair.ours else {**errors, "output": relative(got.logits, want.logits)}


def conversion(budget: Budget, pair: Pair) -> None:
    """Level 1: the table of names is a bijection, and arrays come back from the Flax module bit for bit."""
    model = pair.flax.build(pair.arrays)
    state = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
    back = pair.flax.named(state[1], state[2])
    assert back.keys() == pair.arrays.keys(), sorted(back.keys() ^ pair.arrays.keys())
    errors = {name: largest(back[name], array) for name, array in pair.arrays.items()}
    budget.hold(1, "torch -> JAX -> torch", pair.dtype, errors, str(pair))


def outputs(budget: Budget, pair: Pair, train: bool, got: Pass | None = None, want: Pass | None = None) -> None:
    """Level 3: every activation and the output."""
    got = got or forward(pair, train)

    def compare(budget: Budget, want: Pass) -> None:
        compare_outputs(budget, pair, "train" if train else "eval", got, want)

    def again(changes: Sequence[Change]) -> Pass:
        return original(pair, train, changes=changes)

    _explained(budget, compare, want or again(()), again, in_forward_pass(pair, train))


def gradients(budget: Budget, pair: Pair, got: Pass | None = None, want: Pass | None = None) -> None:
    """Level 5: the loss and the gradient of every parameter."""
    got = got or forward(pair, True, loss=True)

    def again(changes: Sequence[Change]) -> Pass:
        return original(pair, True, loss=True, changes=changes)

    def compare(budget: Budget, want: Pass) -> None:
        compare_gradients(budget, pair, got, want)

    _explained(budget, compare, want or again(()), again, in_forward_pass(pair, True), of_scale, got)


def buffers(budget: Budget, pair: Pair, numbers: Sequence[int] = range(1, PASSES + 1)) -> tuple[Pass, Pass]:
    """Level 6: running statistics after several training passes; returns the last of them."""
    got = forward(pair, True, numbers)

    def again(changes: Sequence[Change]) -> Pass:
        return original(pair, True, numbers, changes=changes)

    def compare(budget: Budget, want: Pass) -> None:
        compare_buffers(budget, pair, got, want)

    want = again(())
    _explained(budget, compare, want, again, in_forward_pass(pair, True))
    return got, want


def updates(budget: Budget, pair: Pair, count: int = UPDATES) -> None:
    """Level 7: the parameters after each update with the same gradients, of very different magnitudes."""
    parameters = {name: array for name, array in pair.arrays.items() if not is_buffer(name)}
    rng = np.random.default_rng(0)
    sizes = {name: 10.0 ** rng.uniform(-6, 1, array.shape) for name, array in parameters.items()}
    given = [
        {name: (rng.standard_normal(size.shape) * size).astype(pair.dtype) for name, size in sizes.items()}
        for _ in range(count)
    ]
    make = pair.torch.optimizer

    def again(changes: Sequence[Change]) -> list[Arrays]:
        return on_torch(torch_training.updates, make, parameters, given, 0.0, list(changes))

    want = again(())
    got = jax_training.updates(pair.optimizer, parameters, given, want if pair.dtype == "float32" else ())

    def compare(budget: Budget, want: list[Arrays]) -> None:
        compare_updates(budget, pair.dtype, got, want, str(pair))

    _explained(budget, compare, want, again, in_updates(pair))


def trajectory(
    budget: Budget, pair: Pair, steps: int = STEPS, got: Trajectory | None = None, want: Trajectory | None = None
) -> Trajectory:
    """Level 8: a training in each framework; returns PyTorch's."""
    got = got or follow(pair.trainer, pair.trainer.start(pair.arrays), range(steps))[1]

    def again(changes: Sequence[Change]) -> Trajectory:
        batches = {number: pair.batch(number) for number in range(steps)}
        return on_torch(torch_training.train, pair.torch, pair.arrays, batches, list(changes))

    def compare(budget: Budget, want: Trajectory) -> None:
        compare_trajectories(budget, 8, pair, got, want, str(pair))

    want = want or again(())
    _explained(budget, compare, want, again, in_training(pair))
    return want


def swapped(budget: Budget, pair: Pair, straight: Trajectory, steps: int = STEPS) -> None:
    """Level 9: half a training in each framework, in both orders, with weights, statistics and optimizer carried over.

    `straight` is the training in one framework. For Adam, AdamW and SGD.
    """
    half, trainer, rows = steps // 2, pair.trainer, [row for row in pair.flax.rows if row.parameter]
    batches = [{n: pair.batch(n) for n in numbers} for numbers in (range(half), range(half, steps))]
    settings = on_torch(torch_training.settings, pair.torch)
    adam = OptimConfig(name="adam") if "betas" in settings else OptimConfig(name="sgd", momentum=settings["momentum"])

    first, moments = on_torch(torch_training.train_from, pair.torch, pair.arrays, {}, batches[0])
    params, parts, blank = trainer.start(first.arrays)
    state = params, parts, from_torch(adam, rows, blank, moments, half)
    rest = follow(trainer, state, range(half, steps))[1]
    got = Trajectory(first.losses + rest.losses, rest.arrays, rest.logits)
    compare_trajectories(budget, 9, pair, got, straight, f"torch -> JAX, {pair}")

    state, first = follow(trainer, trainer.start(pair.arrays), range(half))
    moments = to_torch(adam, rows, state[2])
    rest, _ = on_torch(torch_training.train_from, pair.torch, first.arrays, moments, batches[1])
    got = Trajectory(first.losses + rest.losses, rest.arrays, rest.logits)
    compare_trajectories(budget, 9, pair, got, straight, f"JAX -> torch, {pair}")


def prove(pair: Pair, budget: Budget, say: Callable[[str], None] = lambda line: None, steps: int = STEPS) -> None:
    """Compare both halves, from the names to the swapped training; raises at the first level that fails.

    Float32 trainings are chaotic: they are compared over 5 steps, and not swapped.
    """
    rough = pair.dtype == "float32"
    steps = min(steps, 5) if rough else steps
    conversion(budget, pair)
    say("level 1: names and shapes agree, arrays come back bit for bit")
    outputs(budget, pair, train=False)
    outputs(budget, pair, train=True)
    say("level 3: every activation and the output agree, in evaluation and in training")
    gradients(budget, pair)
    say("level 5: the loss and every gradient agree")
    if any(name.endswith("running_var") for name in pair.arrays):
        buffers(budget, pair)
        say(f"level 6: the running statistics agree after {PASSES} passes")
    if pair.optimizer is None:
        return
    updates(budget, pair)
    say(f"level 7: {UPDATES} updates agree")
    straight = trajectory(budget, pair, steps)
    say(f"level 8: {steps} training steps agree")
    if not rough:
        swapped(budget, pair, straight, steps)
        say("level 9: a training begun in one framework and finished in the other agrees, both ways")


def _explained(
    budget: Budget,
    compare: Callable[[Budget, Any], None],
    want: Any,
    again: Callable[[Sequence[Change]], Any],
    candidates: Any,
    signature: Callable[[Any, Any], str | None] | None = None,
    got: Any = None,
) -> None:
    """Compare with `want`; on a difference, add its likely cause to the message.

    `again` computes `want` with mistakes imitated.
    """
    try:
        compare(budget, want)
    except DifferenceError as difference:
        said = signature(got, want) if signature else None
        said = said or diagnose(difference, _trial(budget, compare, again), candidates)
        raise DifferenceError(f"{difference}\n{said}", difference.order, {}, difference.first) from None


def _trial(budget: Budget, compare: Callable[[Budget, Any], None], again: Callable[..., Any]) -> Trial:
    def trial(changes: Sequence[Change]) -> DifferenceError | None:
        try:
            compare(Budget(ours=budget.ours), again(changes))
        except DifferenceError as difference:
            return difference
        return None

    return trial
