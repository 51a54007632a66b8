"""Find the likely cause of a difference: the known mistake that makes PyTorch give the Flax module's numbers."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from parity_tests.support import torch_side, torch_training
from parity_tests.support.budget import DifferenceError
from parity_tests.support.case import Pass
from parity_tests.support.causes import CAUSES, OPTIMIZER_CAUSES, Call
from parity_tests.support.imitate import Change
from parity_tests.support.pair import Pair
from parity_tests.support.torch_side import on_torch

Trial = Callable[[Sequence[Change]], DifferenceError | None]
"""Compare again, with PyTorch imitating these mistakes; returns the difference that is left."""

Candidates = Callable[[Sequence[Change], DifferenceError], "Iterable[Iterable[Findings]]"]
"""Mistakes to try for a difference that is left when others are imitated; a group is tried if those before it fail."""

MOST = 8
"""Causes to name at most."""


class Finding(NamedTuple):
    """A mistake that explains a difference."""

    change: Change
    where: str
    says: str
    remedy: str

    def __str__(self) -> str:
        return f"likely cause: {self.change.cause}{self.where}: {self.says}. {self.remedy}."


Findings = tuple[Finding, ...]


def diagnose(difference: DifferenceError, trial: Trial, candidates: Candidates) -> str:
    """Name the mistakes that explain a difference, one line each, and what is left.

    Tries each candidate; keeps the one that makes the difference vanish, or else the one that moves it furthest down
    the computation; and goes on from there, so that several mistakes are found one after the other.
    """
    found: list[Finding] = []
    left: DifferenceError | None = trial([]) or difference  # counted by a budget of its own, as in all trials
    while left is not None and len(found) < MOST:
        step = _best(left, trial, found, candidates([each.change for each in found], left))
        if step is None:
            break
        found += step[0]
        left = step[1]
    lines = [str(each) for each in found]
    if left is None:
        lines.append(f"With {'this' if len(found) == 1 else 'these'} imitated in PyTorch, the two agree.")
    elif found:
        these = "this" if len(found) == 1 else "these"
        lines.append(
            f"With {these} imitated in PyTorch, the first difference is {left.first}; no known cause explains it."
        )
    else:
        lines.append(
            f"No known cause explains it; look at the code between {left.first} and the value before it. "
            f"Tried: {', '.join((*CAUSES, *OPTIMIZER_CAUSES))}."
        )
    return "\n".join(lines)


def _best(
    left: DifferenceError, trial: Trial, found: Sequence[Finding], candidates: Iterable[Iterable[Findings]]
) -> tuple[Findings, DifferenceError | None] | None:
    """The candidate that gets furthest, and the difference that is left with it; None if none gets further."""
    best: tuple[Findings, DifferenceError] | None = None
    for group in candidates:
        for candidate in group:
            try:
                rest = trial([each.change for each in (*found, *candidate)])
            except (RuntimeError, ValueError, IndexError, AssertionError):
                continue  # the network cannot be computed in this way
            if rest is None:
                return candidate, None
            if rest.order > (best[1] if best else left).order:
                best = candidate, rest
        if best:
            break
    return best


def in_forward_pass(pair: Pair, train: bool) -> Candidates:
    """Candidates for a difference in a forward pass.

    First one mistake, nearest to the first difference first; then two of those that are between the first difference
    and the value before it, where neither alone would show.
    """

    def candidates(changes: Sequence[Change], left: DifferenceError) -> Iterator[Iterable[Findings]]:
        events = on_torch(torch_side.calls_of, pair.torch, pair.arrays, pair.batch(0), train, changes)
        calls = [event for event in events if isinstance(event, Call)]
        near = _suspects(events, left.first)
        far = [call for call in calls if call not in near]
        yield _alone([*_at_one_site(near), *_everywhere(calls), *_at_one_site(far)])
        yield (two for two in combinations(_at_one_site(near), 2) if two[0].change.site != two[1].change.site)

    return candidates


def _alone(findings: Iterable[Finding]) -> Iterator[Findings]:
    return ((each,) for each in findings)


def in_training(pair: Pair) -> Candidates:
    """Candidates for a difference in a training: the optimizer's settings, then the forward pass."""

    def candidates(changes: Sequence[Change], left: DifferenceError) -> Iterator[Iterable[Findings]]:
        yield from in_updates(pair)(changes, left)
        yield from in_forward_pass(pair, True)(changes, left)

    return candidates


def in_updates(pair: Pair) -> Candidates:
    """Candidates for a difference in updates, for the settings of PyTorch's optimizer."""
    return lambda changes, left: (_alone(_of_optimizer(on_torch(torch_training.settings, pair.torch))),)


def _of_optimizer(settings: Mapping[str, Any]) -> list[Finding]:
    result = []
    for name, cause in OPTIMIZER_CAUSES.items():
        for value in cause.values(settings):
            says = (
                f"the Flax side updates as with {_said(value)}, PyTorch with {_said({k: settings[k] for k in value})}"
            )
            result.append(Finding(Change(name, value), "", says, cause.remedy))
    return result


def _said(settings: Mapping[str, Any]) -> str:
    kinds = {True: "decoupled weight decay (AdamW)", False: "weight decay as L2 in the gradient (Adam)"}
    words = []
    for name, value in settings.items():
        words.append(kinds[value] if name == "decoupled_weight_decay" else f"{name}={_number(value)}")
    return ", ".join(words)


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _suspects(events: Sequence[Any], first: str) -> list[Call]:
    """Calls between the activation `first`, or the end, and the activation before it; the last call first."""
    near: list[Call] = []
    for event in events:
        if event == first:
            break
        near = [*near, event] if isinstance(event, Call) else []
    part = first.rpartition(".")[0]
    own = [event for event in events if isinstance(event, Call) and event.site.split(":")[0] == part and part]
    return [*reversed(near), *(call for call in own if call not in near)]


def _everywhere(calls: Sequence[Call]) -> Iterator[Finding]:
    """Each cause at all calls of a function, for the functions that are called several times."""
    for function in dict.fromkeys(call.function for call in calls):
        mine = [call for call in calls if call.function == function]
        found = {
            (each.change.cause, str(each.change.value)): each
            for call in mine
            for each in _at_one_site([call], f"*:{function}")
        }
        yield from found.values() if len(mine) > 1 else ()


def _at_one_site(calls: Sequence[Call], site: str = "") -> Iterator[Finding]:
    for call in calls:
        module, function, *_ = call.site.split(":")
        where = f" in {module} ({function})" if module else f" in {function}, called outside of the layers"
        where = f" in every {function}" if site else where
        for name, cause in CAUSES.items():
            for value in cause.values(call) if function in cause.functions else ():
                yield Finding(Change(name, value, site or call.site), where, cause.says(call, value), cause.remedy)


def of_scale(got: Pass, want: Pass) -> str | None:
    """The cause, if the loss and every gradient are the same multiple of PyTorch's."""
    if not got.gradients or not want.gradients or not got.loss or not want.loss:
        return None
    factor = got.loss / want.loss
    same = all(np.allclose(got.gradients[name], factor * array, 1e-6, 1e-12) for name, array in want.gradients.items())
    if not same or abs(factor - 1) < 1e-6:
        return None
    return (
        f"likely cause: reduction of the loss: the loss and all gradients are {factor:g} times PyTorch's. "
        "Take the mean over the same elements as PyTorch does, or the sum."
    )
