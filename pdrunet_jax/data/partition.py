"""From checked pairs to samples with patients and splits, declared or drawn."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pdrunet_jax.config import DataConfig
from pdrunet_jax.data.layouts import SPLITS, Pair
from pdrunet_jax.data.masks import MaskCoding
from pdrunet_jax.data.scan import Scanned, foreground_share
from pdrunet_jax.data.split import assign, overlaps, patients_of, together


@dataclass(frozen=True)
class Sample:
    """One image with its mask."""

    id: str
    """Image path relative to the dataset's root, POSIX; absolute where a manifest refers to it elsewhere."""
    image: Path
    mask: Path | None
    patient: str
    split: str
    """One of "train", "val" and "test"."""
    digest: str = ""
    """SHA-256 of both files' bytes."""


def partition(
    config: DataConfig, pairs: Sequence[Pair], scanned: Sequence[Scanned], coding: MaskCoding
) -> tuple[tuple[Sample, ...], list[str], list[str]]:
    """Samples in the order of `pairs`, what the log should say, and what is wrong.

    A declared split is kept, and checked: no patient and no image may be in two. Otherwise, and for a validation
    split that was not declared, patients are drawn by `config.split_seed`.
    """
    ids = [pair.id for pair in pairs]
    patients, notes, problems = patients_of(ids, [pair.patient for pair in pairs], config.patient_regex)
    pixels = [item.pixels for item in scanned]
    groups = together(patients, pixels)
    shares = [foreground_share(item.codes, coding) for item in scanned]
    if any(pair.split for pair in pairs):
        splits = [pair.split or "" for pair in pairs]
        problems += _leaks(ids, patients, pixels, splits)
        if "val" not in splits and "train" in splits and config.val_fraction:
            train = [index for index, split in enumerate(splits) if split == "train"]
            drawn = _draw(train, groups, shares, config.val_fraction, 0.0, config.split_seed)
            splits = [drawn.get(index, split) for index, split in enumerate(splits)]
            notes.append(f"no validation split is declared: some of train by patient, seed {config.split_seed}")
    else:
        every = range(len(ids))
        drawn = _draw(every, groups, shares, config.val_fraction, config.test_fraction, config.split_seed)
        splits = [drawn[index] for index in every]
        notes.append(f"no split is declared: drawn by patient, seed {config.split_seed}")
        merged = len(set(patients)) - len(set(groups))
        if merged:
            notes.append(f"{merged} patients have images identical to another patient's and share their split")
    notes += _twins(ids, pixels)
    samples = tuple(
        Sample(pair.id, pair.image, pair.mask, patient, split, item.digest)
        for pair, item, patient, split in zip(pairs, scanned, patients, splits, strict=True)
    )
    notes.append(split_counts(samples))
    return samples, notes, problems


def _draw(
    indices: Sequence[int], groups: Sequence[str], shares: Sequence[float], val: float, test: float, seed: int
) -> dict[int, str]:
    chosen = assign([groups[i] for i in indices], [shares[i] for i in indices], val=val, test=test, seed=seed)
    return {index: chosen[groups[index]] for index in indices}


def _leaks(ids: Sequence[str], patients: Sequence[str], pixels: Sequence[str], splits: Sequence[str]) -> list[str]:
    def examples(keys: Sequence[str], key: str, where: Sequence[str]) -> str:
        chosen = [next(i for i, k, s in zip(ids, keys, splits, strict=True) if (k, s) == (key, w)) for w in where]
        return ", ".join(chosen)

    problems = [
        f"patient {patient} is in {' and '.join(where)}: {examples(patients, patient, where)}"
        for patient, where in overlaps(patients, splits).items()
    ]
    problems += [
        f"identical pixels in {' and '.join(where)}: {examples(pixels, digest, where)}"
        for digest, where in overlaps(pixels, splits).items()
        if digest
    ]
    return problems


def _twins(ids: Sequence[str], pixels: Sequence[str]) -> list[str]:
    same: dict[str, list[str]] = defaultdict(list)
    for image, digest in zip(ids, pixels, strict=True):
        same[digest].append(image)
    twins = [names for digest, names in same.items() if digest and len(names) > 1]
    return [f"warning: identical pixels: {' = '.join(names)}" for names in twins]


def split_counts(samples: Sequence[Sample]) -> str:
    """How many images of how many patients each split has, in one line."""
    parts = []
    for split in SPLITS:
        inside = [sample for sample in samples if sample.split == split]
        images, patients = len(inside), len({sample.patient for sample in inside})
        plurals = "image" + "s" * (images != 1), "patient" + "s" * (patients != 1)
        parts.append(f"{images} {plurals[0]} of {patients} {plurals[1]} in {split}")
    return ", ".join(parts)
