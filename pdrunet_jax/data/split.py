"""Patients and splits: patient-disjoint training, validation and test samples."""

import hashlib
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import floor
from pathlib import Path, PurePosixPath

from pdrunet_jax.config import DataConfig
from pdrunet_jax.data import folds
from pdrunet_jax.data.folder import SPLITS, Pair
from pdrunet_jax.data.masks import MaskCoding
from pdrunet_jax.data.scan import ScanResult, class_shares, foreground_share

_COLUMN, _PATH, ALONE = "the patient column", "the word patient with digits in the path", "the image itself"
_PATIENT = r"(?i:(?<![a-z])patient[-_ ]?\d+)"  # not an inpatient


@dataclass(frozen=True)
class Sample:
    """An image with its mask."""

    id: str
    """POSIX path of the image relative to the dataset's root; absolute if the manifest refers to another folder."""
    image: Path
    mask: Path
    patient: str
    split: str
    """One of "train", "val" and "test", or `HELD_OUT`."""
    digest: str = ""
    """SHA-256 of both files' bytes."""
    pixels: str = ""
    """SHA-256 of the image's decoded pixels."""
    spacing: tuple[float, float] | None = None
    """(row, column) spacing in mm that the manifest states."""
    layers: tuple[Path | None, ...] = ()
    """As `Pair.layers`."""
    fold: int = 0
    """The fold, from 1, that tests on this image; 0 if there are no folds, or for held-out images."""
    shares: tuple[float, ...] = ()
    """Share of the background (NaN if classes have files of their own) and of each class in the mask's pixels, without
    ignored ones; all 0 if every pixel is ignored."""

    @property
    def mask_files(self) -> list[Path]:
        """Every mask file of the sample."""
        return [path for path in self.layers or (self.mask,) if path is not None]


@dataclass(frozen=True)
class Partition:
    """Samples with their patients and splits."""

    samples: tuple[Sample, ...]
    patients: str
    """What named the patients."""
    notes: list[str]
    problems: list[str]


def partition(
    config: DataConfig, pairs: Sequence[Pair], scanned: Sequence[ScanResult], coding: MaskCoding
) -> Partition:
    """Assign a patient and a split to each pair, in the order of `pairs`.

    A declared split is kept and checked: no patient and no image may be in two. An undeclared split, or validation
    split, is drawn by patient with `config.split_seed`.

    With `config.fold_of`, the patients whose images are not declared as test are cut into folds.
    """
    ids = [pair.id for pair in pairs]
    patients, source, notes, problems = patients_of(pairs, config.patient_regex)
    pixels = [item.pixels for item in scanned]
    groups = together(patients, pixels)
    splits = [pair.split or "" for pair in pairs]
    shares = [foreground_share(item.codes, coding) for item in scanned]
    if any(splits):
        problems += _leaks(ids, patients, pixels, splits)
    else:
        if not config.fold:
            notes.append(f"no split is declared: drawn by patient, seed {config.split_seed}")
        merged = len(set(patients)) - len(set(groups))
        if len(set(groups)) == 1 and len(ids) > 1:
            notes.append(f"warning: {one_patient(len(ids), groups[0], source)}")
        if merged:
            notes.append(f"{merged} patients have images identical to another patient's and share their split")
    # Test images by fold. From then on it is as if train and test were declared.
    numbers = [0] * len(ids)
    if config.fold_of:
        fold, count = config.fold_of
        numbers = _fold_numbers(groups, shares, splits, count, config.split_seed)
        parts = len({group for group, number in zip(groups, numbers, strict=True) if number})
        problems += [f"data.fold = {config.fold}: {reason}"] if (reason := folds.too_few(parts, count)) else []
        held_out = numbers.count(0)
        splits = [{0: folds.HELD_OUT, fold: "test"}.get(number, "train") for number in numbers]
        notes.append(f"{count} folds are drawn by patient, seed {config.split_seed}")
        notes += [f"{held_out} declared test images are held out of all folds"] if held_out else []
    # Which images need a split: all, or if splits are declared without val, those of train.
    undecided, test_fraction = list(range(len(ids))), config.test_fraction
    if any(splits):
        no_val = "val" not in splits and config.val_fraction
        undecided, test_fraction = [index for index in undecided if no_val and splits[index] == "train"], 0.0
        if undecided and not config.fold:
            notes.append(f"no validation split is declared: some of train by patient, seed {config.split_seed}")
    drawn = assign(
        [groups[index] for index in undecided],
        [shares[index] for index in undecided],
        val=config.val_fraction,
        test=test_fraction,
        seed=config.split_seed,
    )
    for index in undecided:
        splits[index] = drawn[groups[index]]
    notes += _twins(identical(ids, pixels))
    samples = tuple(
        Sample(
            pair.id,
            pair.image,
            pair.mask,
            patient,
            split,
            digest=item.digest,
            pixels=item.pixels,
            spacing=pair.spacing,
            layers=pair.layers,
            fold=fold,
            shares=tuple(class_shares(item.codes, coding)),
        )
        for pair, item, patient, split, fold in zip(pairs, scanned, patients, splits, numbers, strict=True)
    )
    notes.append(folds.note(*config.fold_of, split_counts(samples)) if config.fold_of else split_counts(samples))
    return Partition(samples, source, notes, problems)


def _fold_numbers(
    groups: Sequence[str], shares: Sequence[float], splits: Sequence[str], count: int, seed: int
) -> list[int]:
    """The fold of each image, from 1 to `count`; 0 for declared test images."""
    inside = [index for index, split in enumerate(splits) if split != "test"]
    drawn = folds.assign_folds(
        [groups[index] for index in inside], [shares[index] for index in inside], count=count, seed=seed
    )
    return [0 if split == "test" else drawn[group] for group, split in zip(groups, splits, strict=True)]


def patients_of(pairs: Sequence[Pair], regex: str | None) -> tuple[list[str], str, list[str], list[str]]:
    """Find each image's patient; returns patients, what named them, notes for the log, and problems.

    In order of precedence: `regex` on the path (its first group, or the whole match), the declared patient, `patient`
    with a number in the path, the image itself. The last two do not depend on where images are that the manifest names
    by absolute paths: the number is searched below their common folder, and such an image goes by its mask's path.
    """
    if regex is not None:
        matches = [re.search(regex, pair.id) for pair in pairs]
        missed = [pair.id for pair, match in zip(pairs, matches, strict=True) if not match]
        problems = [f"{image}: data.patient_regex {regex!r} finds no patient" for image in missed]
        patients = [_matched(match, pair.id) for pair, match in zip(pairs, matches, strict=True)]
        return patients, "data.patient_regex", [], problems
    patients = []
    sources: Counter[str] = Counter()
    for pair, place in zip(pairs, _below_common_folder([pair.id for pair in pairs]), strict=True):
        match = re.search(_PATIENT, place)
        source = _COLUMN if pair.patient else _PATH if match else ALONE
        sources[source] += 1
        patients.append(
            pair.patient or _matched(match, pair.mask_id if PurePosixPath(pair.id).is_absolute() else pair.id)
        )
    notes = []
    if alone := sources[ALONE]:
        which = "each image" if alone == len(pairs) else f"each of {alone} images"
        notes.append(
            f"no patients are known: {which} counts as a patient of its own, so images of one person may be in two "
            "splits; give a patient column or data.patient_regex"
        )
    return patients, " or ".join(sources), notes, []


def one_patient(images: int, patient: str, source: str) -> str:
    """What to do about images that all count as one patient's."""
    return (
        f"all {images} images count as one patient, {patient}, by {source}, and a split keeps a patient together; "
        "give the right patients with --data.patient-regex or a patient column, or --data.patient-regex '.+' for a "
        "split by images"
    )


def _below_common_folder(ids: Sequence[str]) -> list[str]:
    """`ids`, with absolute paths made relative to the folder that they have in common."""
    absolute = [image for image in ids if PurePosixPath(image).is_absolute()]
    common = posixpath.commonpath([posixpath.dirname(image) for image in absolute]) if absolute else ""
    return [posixpath.relpath(image, common) if PurePosixPath(image).is_absolute() else image for image in ids]


def together(patients: Sequence[str], pixels: Sequence[str]) -> list[str]:
    """Each image's group: its patient, merged with every patient who has an image with the same pixels."""
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
    """Draw a split for each group; `val` and `test` are fractions of the groups.

    Groups are stratified by their mean foreground share in `shares` and drawn by a hash of seed and group, so the
    result is the same on every machine. If there are enough groups, a positive fraction gets at least one, and at
    least one group stays in train.
    """
    means: dict[str, list[float]] = defaultdict(list)
    for group, share in zip(groups, shares, strict=True):
        means[group].append(share)
    left = sorted(means, key=lambda group: (sum(means[group]) / len(means[group]), group))
    total = len(left)
    result = {}
    for split, fraction in (("val", val), ("test", test)):
        count = max(0, min(max(1, floor(fraction * total + 0.5)), len(left) - 1)) if fraction > 0 else 0
        for group in _draw(left, count, f"{split}:{seed}"):
            result[group] = split
        left = [group for group in left if group not in result]
    return result | dict.fromkeys(left, "train")


def overlaps(ids: Sequence[str], keys: Sequence[str], splits: Sequence[str]) -> Mapping[str, Mapping[str, str]]:
    """Keys that occur in more than one split, with the id of the first image in each of these splits."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for image, key, split in zip(ids, keys, splits, strict=True):
        found[key].setdefault(split, image)
    return {key: dict(sorted(where.items())) for key, where in found.items() if len(where) > 1}


def identical(ids: Sequence[str], pixels: Sequence[str]) -> list[list[str]]:
    """Images with the same pixel digest, in groups of two or more."""
    same: dict[str, list[str]] = defaultdict(list)
    for image, digest in zip(ids, pixels, strict=True):
        same[digest].append(image)
    return [names for digest, names in same.items() if digest and len(names) > 1]


def _twins(groups: Sequence[Sequence[str]], most: int = 5) -> list[str]:
    """A warning for each of the first groups of identical images, and one for the others."""
    lines = []
    for names in groups[:most]:
        more = f" and {len(names) - most} more" if len(names) > most else ""
        lines.append(f"warning: identical pixels: {' = '.join(names[:most])}{more}")
    if len(groups) > most:
        lines.append(f"warning: identical pixels in {len(groups) - most} more groups of images")
    return lines


def manifest_rows(root: Path, samples: Sequence[Sample]) -> list[dict[str, str]]:
    """The manifest's rows for `samples`, whose masks are below `root`."""
    columns = ("image", "mask", "patient", "split")
    cells = ((each.id, each.mask.relative_to(root).as_posix(), each.patient, each.split) for each in samples)
    return [dict(zip(columns, row, strict=True)) for row in cells]


def split_counts(samples: Sequence[Sample]) -> str:
    """Images and patients of each split, in one line."""
    parts = []
    for split in SPLITS:
        inside = [sample for sample in samples if sample.split == split]
        images, patients = len(inside), len({sample.patient for sample in inside})
        plurals = "image" + "s" * (images != 1), "patient" + "s" * (patients != 1)
        parts.append(f"{images} {plurals[0]} of {patients} {plurals[1]} in {split}")
    return ", ".join(parts)


def _matched(match: "re.Match[str] | None", image: str) -> str:
    if match is None:
        return image
    return next((group for group in match.groups() if group is not None), match.group(0))


def _draw(ordered: Sequence[str], count: int, salt: str) -> list[str]:
    """Draw one group from each of `count` runs of equal length."""
    bounds = [index * len(ordered) // count for index in range(count + 1)] if count else [0]
    runs = [ordered[start:end] for start, end in pairwise(bounds)]
    return [min(run, key=lambda group: hashlib.sha256(f"{salt}:{group}".encode()).digest()) for run in runs]


def _leaks(ids: Sequence[str], patients: Sequence[str], pixels: Sequence[str], splits: Sequence[str]) -> list[str]:
    problems = [
        f"patient {patient} is in {' and '.join(where)}: {', '.join(where.values())}"
        for patient, where in overlaps(ids, patients, splits).items()
    ]
    return problems + [
        f"identical pixels in {' and '.join(where)}: {', '.join(where.values())}"
        for digest, where in overlaps(ids, pixels, splits).items()
        if digest
    ]
