"""A dataset folder, opened and checked: samples, patients, splits, mask coding, and the report of `data check`."""

import hashlib
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pdrunet_jax.config import DataConfig
from pdrunet_jax.data import remarks
from pdrunet_jax.data.cache import Cache, keeps
from pdrunet_jax.data.fit import Fit, Spacing
from pdrunet_jax.data.folder import read_description
from pdrunet_jax.data.hints import hint
from pdrunet_jax.data.images import read_bytes, read_spacing
from pdrunet_jax.data.layers import LAYER, LayersCoding, declared_layers, find_layers, resolve_layers
from pdrunet_jax.data.layouts import find_pairs
from pdrunet_jax.data.masks import PADDING, MaskCoding, codes_to_classes
from pdrunet_jax.data.resolve import all_empty, resolve
from pdrunet_jax.data.scan import ScanResult, class_shares, foreground_share, image_remarks, scan
from pdrunet_jax.data.split import ALONE, Sample, assign, identical, partition, split_counts, together
from pdrunet_jax.data.walk import some, walk
from pdrunet_jax.model.sides import Pairs
from pdrunet_jax.runtime.errors import DataError, UserError
from pdrunet_jax.runtime.files import is_vacant
from pdrunet_jax.runtime.processes import Group

if TYPE_CHECKING:
    from pdrunet_jax.data.phantoms.surfaces.training import DrawnAnew

_HOW_TO_GET_DATA = """\
MURA's radiographs are free of charge after registration: https://stanfordmlgroup.github.io/competitions/mura/
Masks for its humerus and forearm images (CC BY 4.0) are in the FleXray data release, folder
mura_forearm_humerus_annotations: https://huggingface.co/datasets/VictorButoi/flexray-data
    python -m pdrunet_jax.data import-mura MURA-v1.1 data/mura --region XR_HUMERUS --masks FOLDER
    python -m pdrunet_jax.data import-mura --help    explains how to make a dataset folder of both
    python -m pdrunet_jax.train --config phantom     trains on synthetic X-rays, without any data"""

_LAYOUTS = """\
A dataset folder has one of
    manifest.csv                        columns image,mask and optionally patient,split; paths relative to it
    {train,val,test}/{images,masks}/    pairs with the same name
    images/ and masks/                  pairs with the same name, also {images,masks}/{train,val,test}/;
                                        a mask may have words such as mask, seg, label or gt in its name
    x.png with x_mask.png               images and masks in one folder, or in train/, val/ and test/
    imagesTr/ and labelsTr/             nnU-Net: case_0000.png with case.png; classes from dataset.json
Exports of other tools become one by an importer: python -m pdrunet_jax.data --help lists them."""


@dataclass(frozen=True)
class Dataset:
    """A checked dataset folder."""

    root: Path
    name: str
    class_names: tuple[str, ...]
    """Foreground classes; the class index is the position plus 1."""
    coding: MaskCoding
    """How mask pixels become class indices."""
    samples: tuple[Sample, ...]
    notes: tuple[str, ...]
    """Remarks for the log."""
    spacing: tuple[float, float] | None = None
    """(row, column) spacing in mm that dataset.toml declares for all images."""
    swap_on_flip: Pairs | None = ()
    """Pairs of classes that change places in a mirror image; None if unknown: images must not be mirrored."""
    patients_from: str = ""
    """What named the patients."""
    drawn: "DrawnAnew | None" = None
    """Where training images come from if they are drawn while training; there are no training samples then."""
    _caches: dict[Any, Cache] = field(default_factory=dict, init=False, compare=False, repr=False)
    """Resized pixels by size, channels and kind of mask; not part of the dataset's identity."""

    @property
    def outputs(self) -> int:
        """Output channels of a model for this dataset: 1 for one class, n + 1 for n, n for n that overlap."""
        if self.multilabel:
            return len(self.class_names)
        return 1 if len(self.class_names) == 1 else len(self.class_names) + 1

    @property
    def multilabel(self) -> bool:
        """Whether classes overlap: masks are (H, W, K) then."""
        return isinstance(self.coding, LayersCoding)

    def of(self, split: str) -> tuple[Sample, ...]:
        """The samples of "train", "val", "test" (or another `Sample.split`) or "all", in the order of their ids."""
        return tuple(sample for sample in self.samples if split in (sample.split, "all"))

    @property
    def layers(self) -> tuple[int, ...]:
        """Shape of a mask behind (H, W): the number of classes if they overlap."""
        return (len(self.class_names),) if self.multilabel else ()

    def class_shares(self, split: str) -> list[float]:
        """Mean share of each class in the pixels of a split, the background's first unless classes overlap.

        Each image counts the same, whatever its size; ignored pixels do not count.
        """
        first = 1 if self.multilabel else 0
        rows = [each.shares[first:] for each in self.of(split) if self.multilabel or any(each.shares)]
        if not rows:
            return [0.0] * (len(self.class_names) + 1 - first)
        return [float(share) for share in np.mean(rows, axis=0)]

    def spacing_of(self, sample: Sample) -> Spacing | None:
        """(row, column) spacing in mm from the manifest, else the image file, else dataset.toml. Raises `DataError`."""
        return _spacing_of(sample, self.spacing)

    def cache(self, fit: Fit, channels: int, *, soft: bool) -> Cache:
        """The cache for samples of this form, in the order of `samples`; caches of other forms are dropped."""
        key = fit, channels, soft
        if key not in self._caches:
            self._caches.clear()
            self._caches[key] = Cache(len(self.samples), fit.size, channels, self.layers)
        return self._caches[key]

    def adopt(self, cache: Cache, scanned: Sequence[ScanResult], fit: Fit) -> None:
        """Keep the `cache` that `scan` filled, with its mask values turned into classes."""
        for row, item in enumerate(scanned):
            if item.held is not None:
                places = [place for place, code in enumerate(item.held) if code in item.codes]
                classes = np.zeros(256, np.uint8)
                classes[places] = codes_to_classes(np.array([[item.held[place] for place in places]]), self.coding, "")
                cache.recode(row, classes)
                box = fit.box(item.size)
                cache.masks[row] = box.place(box.crop(cache.masks[row]), fit.size, PADDING)
        self._caches[fit, cache.images.shape[-1], False] = cache

    def in_order(self, names: Sequence[str]) -> "Dataset":
        """The dataset with its classes in the order of `names`, which are the same ones."""
        if tuple(names) == self.class_names:
            return self
        order = [self.class_names.index(name) for name in names]

        def ordered(values: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(values[place] for place in order) if values else ()

        coding = replace(self.coding, classes=ordered(self.coding.classes))
        if isinstance(coding, LayersCoding):
            coding = replace(coding, files=ordered(coding.files))
        samples = tuple(
            replace(each, layers=ordered(each.layers), shares=(*each.shares[:1], *ordered(each.shares[1:])))
            for each in self.samples
        )
        return replace(self, class_names=coding.names, coding=coding, samples=samples)

    def fingerprint(self) -> str:
        """SHA-256 of files, splits, patients and coding: everything that a run's data depend on.

        It is the same for all folds: which of them is the test set is a setting.
        """
        content: list[list[Any]] = [
            # The same file in another class's place is other data.
            [sample.id, sample.fold or sample.split, sample.patient, sample.digest, *map(bool, sample.layers)]
            for sample in self.samples
        ]
        drawn = [self.drawn.digest] if self.drawn else []
        return hashlib.sha256(json.dumps([content, repr(self.coding), *drawn]).encode()).hexdigest()

    def changed(self) -> list[str]:
        """Ids of the samples whose files are no longer those that `open_dataset` read. Reads every byte again."""

        def digest(sample: Sample) -> str:
            masks = (read_bytes(path, f"the mask of {sample.id}") for path in sample.mask_files)
            contents = (read_bytes(sample.image, sample.id), *masks)
            return hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents)).hexdigest()

        return [sample.id for sample in self.samples if digest(sample) != sample.digest]


@dataclass(frozen=True)
class Inspection:
    """A dataset with the results of its check."""

    dataset: Dataset
    layout: str
    scanned: tuple[ScanResult, ...]
    """In the order of the dataset's samples."""


def open_dataset(config: DataConfig) -> Dataset:
    """Open and check the dataset at `config.root`, after drawing phantoms into a missing or empty folder if requested.

    Every file is read once. Raises `UserError` if there is no dataset, `DataError` with all problems.
    """
    return inspect_dataset(config).dataset


def inspect_dataset(config: DataConfig) -> Inspection:
    """Like `open_dataset`, with layout, sizes, modes and pixel counts."""
    root = Path(config.root)
    if not config.root:
        raise UserError("--data.root is empty; is a variable of the shell unset?")
    if config.phantoms and is_vacant(root):
        # Only here: SciPy, which draws them, takes about a second to import.
        from pdrunet_jax.data.phantoms.surfaces.files import draw_dataset

        draw_dataset(root, config)
    # Find a dataset and its declarations before reading any image.
    if is_vacant(root) or not root.is_dir():
        state = "is empty" if root.is_dir() else "is a file" if root.exists() else "does not exist"
        raise UserError(f"--data.root {config.root}: the folder {state}.\n{_HOW_TO_GET_DATA}\n{_LAYOUTS}")
    description = read_description(root)
    declared = description.coding(config)
    try:
        re.compile(config.patient_regex or "")
    except re.error as error:
        regex = config.patient_regex
        raise UserError(f"data.patient_regex {regex!r} is not a regular expression: {error}") from None
    by_class = find_layers(root, declared.names) if config.multilabel else None
    found = by_class[0] if by_class else find_pairs(root)
    if config.multilabel:
        declared = declared_layers(declared, by_class[1] if by_class else declared.names, files=by_class is not None)
    if not (found.pairs or found.problems):
        advice = hint([path.relative_to(root).as_posix() for path in walk(root).files])
        words = " ".join(filter(None, ("no images with masks here.", advice)))
        raise UserError(f"--data.root {config.root}: {words}\n{_LAYOUTS}\n{_HOW_TO_GET_DATA}")
    # Read every file; resized pixels are kept for the first epoch if they fit in memory.
    pairs = sorted(found.pairs, key=lambda pair: pair.id)
    fit = Fit.of(config)
    later = config.soft_masks or config.spacing or config.multilabel
    cache = Cache(len(pairs), fit.size, 1) if keeps(config, len(pairs), 1) and not later else None
    scanned = scan(pairs, declared, config.threads, fit, cache)
    problems = found.problems + [problem for item in scanned for problem in item.problems]
    notes, coding = [*found.notes, *image_remarks(pairs, scanned)], declared
    # Settle the coding on all masks together, then patients and splits.
    counts = [(pair.mask_id, item.codes) for pair, item in zip(pairs, scanned, strict=True) if item.codes]
    empty: list[str] = []
    try:
        coding, more = (
            resolve_layers(declared, counts) if isinstance(declared, LayersCoding) else resolve(declared, counts)
        )
        notes += more
        empty = [mask_id for mask_id, codes in counts if not foreground_share(codes, coding)]
    except DataError as error:
        problems += error.problems
    if config.soft_masks and (len(coding.classes) > 1 or coding.ignore):
        problems.append("data.soft_masks is for masks of one class without an ignore value")
    if empty and len(empty) == len(counts):
        problems.append(all_empty(coding, counts))
    elif empty:
        notes.append(f"warning: {len(empty)} empty masks: {some(empty)}")
    parts = partition(config, pairs, scanned, coding)
    problems += parts.problems
    if not problems:
        problems += _scale_problems(parts.samples, scanned, fit, description.spacing)
    if problems:
        raise DataError(f"--data.root {config.root}: {len(problems)} problem{'s' * (len(problems) > 1)}", problems)
    samples = parts.samples
    notes += parts.notes
    swaps, more = remarks.sides(description, config, coding.names)
    notes += more
    ids = [sample.id for sample in samples]
    notes += remarks.absent_classes(samples, scanned, coding) + remarks.turned(ids, scanned)
    notes += remarks.squeezed(ids, scanned, fit) + remarks.padded(scanned, fit)
    name = description.name or root.resolve().name
    dataset = Dataset(
        root, name, coding.names, coding, samples, tuple(notes), description.spacing, swaps, parts.patients
    )
    if cache and (declared.classes or not coding.colours):  # else colour masks were read as numbers
        dataset.adopt(cache, scanned, fit)
    return Inspection(dataset, found.layout, tuple(scanned))


def _spacing_of(sample: Sample, declared: Spacing | None) -> Spacing | None:
    return sample.spacing or read_spacing(sample.image) or declared


def _scale_problems(
    samples: Sequence[Sample], scanned: Sequence[ScanResult], fit: Fit, declared: Spacing | None
) -> list[str]:
    """Images that cannot be brought to `fit.spacing`: their spacing is unknown, or they are too large."""
    problems = []
    for sample, item in zip(samples, scanned, strict=True) if fit.spacing else ():
        try:
            fit.box(item.size, _spacing_of(sample, declared))
        except UserError as error:
            problems.append(f"{sample.id}: {error}")
    return problems


def require_same_data(group: Group, dataset: Dataset) -> None:
    """Raise `UserError` unless every process of `group` sees the data of the main process."""
    group.require_same(
        dataset.fingerprint(),
        f"--data.root {dataset.root} differs from the data of the first process in images, masks or splits. "
        "Give all processes the same files; the folder's path may differ between machines.",
    )


def continue_split(new: Inspection, old: Inspection, config: DataConfig) -> tuple[dict[str, str], int]:
    """Split a dataset that has grown; returns the split of each image id, and the number of images that keep theirs.

    Patients of `old`, and images with the same pixels, keep their split. Other patients are drawn by the fractions and
    the seed of `config`. Raises `DataError` that names every patient who would be in two splits.
    """
    of_patient = {sample.patient: sample.split for sample in old.dataset.samples}
    of_pixels = {
        item.pixels: sample.split for sample, item in zip(old.dataset.samples, old.scanned, strict=True) if item.pixels
    }
    # The splits that each group of patients has already.
    samples, pixels = new.dataset.samples, [item.pixels for item in new.scanned]
    groups = together([sample.patient for sample in samples], pixels)
    kept: dict[str, set[str]] = defaultdict(set)
    for group, sample, digest in zip(groups, samples, pixels, strict=True):
        kept[group] |= {of_patient.get(sample.patient, ""), of_pixels.get(digest, "")} - {""}
    torn = [f"{group}: {' and '.join(sorted(splits))}" for group, splits in kept.items() if len(splits) > 1]
    if torn:
        raise DataError(f"patients of {new.dataset.root} are in two splits of {old.dataset.root}", torn)
    # The others are drawn.
    fresh = [index for index, group in enumerate(groups) if not kept[group]]
    chosen = assign(
        [groups[index] for index in fresh],
        [foreground_share(new.scanned[index].codes, new.dataset.coding) for index in fresh],
        val=config.val_fraction,
        test=config.test_fraction,
        seed=config.split_seed,
    )
    chosen |= {group: next(iter(splits)) for group, splits in kept.items() if splits}
    return {sample.id: chosen[group] for sample, group in zip(samples, groups, strict=True)}, len(samples) - len(fresh)


def report_lines(inspection: Inspection) -> list[str]:
    """The report of `data check`: sizes, modes, classes with their shares, patients, splits, duplicates, notes."""
    dataset, scanned = inspection.dataset, inspection.scanned
    heights, widths = zip(*(item.size for item in scanned), strict=True)
    shares = [class_shares(item.codes, dataset.coding) for item in scanned]
    means = [sum(column) / len(shares) for column in zip(*shares, strict=True)]
    by_split = remarks.counts_by_split(dataset.samples, scanned, dataset.coding)
    ignored = sum(bool({code % LAYER for code in item.codes} & set(dataset.coding.ignore)) for item in scanned)
    names = ("background", *dataset.class_names)
    modes = Counter(item.mode for item in scanned)
    splits = split_counts(dataset.samples)
    twins = sum(map(len, identical([sample.id for sample in dataset.samples], [item.pixels for item in scanned])))
    same = ", in the same split" if twins else ""  # in two splits they are an error
    return [
        f"{dataset.name} at {dataset.root} ({inspection.layout})",
        f"images    {len(scanned)}, {min(widths)} to {max(widths)} pixels wide, {min(heights)} to {max(heights)} high",
        f"modes     {', '.join(f'{count} {mode}' for mode, count in modes.most_common())}",
        *(
            f"class {index}   {name}: {share:.1%} of the pixels, in {sum(masks.values())} masks ({_words(masks)})"
            for index, (name, share, masks) in enumerate(zip(names, means, by_split, strict=True))
            if not math.isnan(share)  # where each class has its own files
        ),
        f"patients  {_patients(dataset)}",
        f"splits    {splits}",
        f"twins     {twins or 'no'} images have the same pixels as another{same}",
        *([f"ignored   {ignored} masks have ignored pixels"] if ignored else []),
        *(f"note      {note}" for note in dataset.notes if note != splits),
    ]


def _words(counts: Mapping[str, int]) -> str:
    """Counts by split in words, such as "8 in train, 2 in val"."""
    return ", ".join(f"{count} in {split}" for split, count in counts.items())


def _patients(dataset: Dataset) -> str:
    """The number of patients, and what named them."""
    if dataset.patients_from == ALONE:
        return f"unknown; each of {len(dataset.samples)} images counts as one"
    return f"{len({sample.patient for sample in dataset.samples})}, named by {dataset.patients_from}"
