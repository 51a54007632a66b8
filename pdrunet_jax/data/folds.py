"""Cross-validation: every patient is in the test images of exactly one fold."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence

HELD_OUT = "held-out"
"""Split of declared test images: they take no part in folds."""


def assign_folds(groups: Sequence[str], shares: Sequence[float], *, count: int, seed: int) -> dict[str, int]:
    """Draw a fold from 1 to `count` for each group.

    Groups are stratified by their mean foreground share in `shares`: of each `count` groups with neighbouring shares,
    one goes to each fold, in the order of a hash of seed and group. The result is the same on every machine, and the
    numbers of groups differ by one at most.
    """
    means: dict[str, list[float]] = defaultdict(list)
    for group, share in zip(groups, shares, strict=True):
        means[group].append(share)
    ordered = sorted(means, key=lambda group: (sum(means[group]) / len(means[group]), group))
    folds: dict[str, int] = {}
    for start in range(0, len(ordered), count):
        run = sorted(ordered[start : start + count], key=lambda group: _hash(f"fold:{seed}:{group}"))
        folds |= {group: number for number, group in enumerate(run, 1)}
    return folds


def too_few(groups: int, count: int) -> str:
    """Why `groups` patients cannot be cut into `count` folds, each with patients to train and validate on, or ""."""
    largest = -(-groups // count)
    if groups >= count and groups - largest >= 2:
        return ""
    least = max(count, 4 if count == 2 else 0)
    return (
        f"{groups} patients (those with identical images count as one) are too few for {count} folds: it takes {least}"
    )


def note(number: int, count: int, text: str) -> str:
    """A remark on one fold; `of_all` leaves it out."""
    return f"fold {number} of {count}: {text}"


def of_all(notes: Sequence[str]) -> tuple[str, ...]:
    """The remarks on a dataset that are not on one fold."""
    return tuple(each for each in notes if not re.match(r"fold \d+ of \d+: ", each))


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
