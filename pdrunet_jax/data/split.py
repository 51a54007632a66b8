"""Patients, and which of them train, validate and test: never one of them twice."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import floor

_PATIENT = r"patient\d+"


def patients_of(
    ids: Sequence[str], declared: Sequence[str | None], regex: str | None
) -> tuple[list[str], list[str], list[str]]:
    """Each image's patient, what the log should say, and what is wrong.

    In this order: `regex` on the path (its first group, or the whole match), the declared patient, `patient` with a
    number in the path, the image itself.
    """
    if regex is not None:
        matches = [re.search(regex, image) for image in ids]
        problems = [
            f"{image}: data.patient_regex {regex!r} finds no patient"
            for image, match in zip(ids, matches, strict=True)
            if not match
        ]
        return [_matched(match, image) for match, image in zip(matches, ids, strict=True)], [], problems
    patients, alone = [], 0
    for image, given in zip(ids, declared, strict=True):
        match = re.search(_PATIENT, image)
        patients.append(given or _matched(match, image))
        alone += not given and not match
    notes = []
    if alone:
        which = "each image" if alone == len(ids) else f"each of {alone} images"
        notes.append(
            f"no patients are known: {which} counts as a patient of its own, so images of one person may be in two "
            "splits; give a patient column or data.patient_regex"
        )
    return patients, notes, []


def together(patients: Sequence[str], pixels: Sequence[str]) -> list[str]:
    """Each image's group: its patient, merged with every patient who has an image of the very same pixels."""
    parent = {patient: patient for patient in patients}

    def root(patient: str) -> str:
        while parent[patient] != patient:
            patient = parent[patient]
        return patient

    first: dict[str, str] = {}
    for patient, digest in zip(patients, pixels, strict=True):
        other = first.setdefault(digest, patient) if digest else patient
        a, b = sorted((root(patient), root(other)))
        parent[b] = a
    return [root(patient) for patient in patients]


def assign(groups: Sequence[str], shares: Sequence[float], *, val: float, test: float, seed: int) -> dict[str, str]:
    """A split for each group: `val` and `test` are their shares of the groups.

    Both are drawn evenly along the mean foreground `shares` of the groups, by a hash of the seed and the group, so
    that the result is the same on every machine. Where there are groups enough, a positive share gets at least one,
    and one group at least stays in train.
    """
    means: dict[str, list[float]] = defaultdict(list)
    for group, share in zip(groups, shares, strict=True):
        means[group].append(share)
    left = sorted(means, key=lambda group: (sum(means[group]) / len(means[group]), group))
    total = len(left)
    result = {}
    for split, fraction in (("val", val), ("test", test)):
        for group in _draw(left, _count(fraction, total, len(left)), f"{split}:{seed}"):
            result[group] = split
        left = [group for group in left if group not in result]
    return result | dict.fromkeys(left, "train")


def overlaps(keys: Sequence[str], splits: Sequence[str]) -> Mapping[str, list[str]]:
    """Keys that occur in more than one split, with those splits."""
    found: dict[str, set[str]] = defaultdict(set)
    for key, split in zip(keys, splits, strict=True):
        found[key].add(split)
    return {key: sorted(where) for key, where in found.items() if len(where) > 1}


def _matched(match: "re.Match[str] | None", image: str) -> str:
    if match is None:
        return image
    return next((group for group in match.groups() if group is not None), match.group(0))


def _count(fraction: float, total: int, left: int) -> int:
    if fraction <= 0:
        return 0
    return max(0, min(max(1, floor(fraction * total + 0.5)), left - 1))


def _draw(ordered: Sequence[str], count: int, salt: str) -> list[str]:
    """One of each of `count` runs of `ordered` that are equally long."""
    bounds = [index * len(ordered) // count for index in range(count + 1)] if count else [0]
    runs = [ordered[start:end] for start, end in pairwise(bounds)]
    return [min(run, key=lambda group: hashlib.sha256(f"{salt}:{group}".encode()).digest()) for run in runs]
