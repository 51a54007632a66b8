"""Import MURA's radiographs, with masks from elsewhere, as a dataset folder that refers to MURA's images.

MURA has no masks. They come as LabelMe files or as images in any coding, named by the paths of their images in MURA.
"""

import os
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from pdrunet_jax.config import DataConfig
from pdrunet_jax.data.folder import Pair
from pdrunet_jax.data.images import SUFFIXES, decode_image, read_bytes
from pdrunet_jax.data.importers.common import (
    LabelTable,
    Source,
    Target,
    check_classes,
    label_table,
    write_description,
    write_mask,
)
from pdrunet_jax.data.importers.labelme import Boxes, Survey
from pdrunet_jax.data.labelme.raster import rasterise
from pdrunet_jax.data.labelme.read import read_annotation
from pdrunet_jax.data.manifest import write_manifest
from pdrunet_jax.data.masks import IGNORE, MaskCoding, colour_name, declare
from pdrunet_jax.data.resolve import resolve
from pdrunet_jax.data.scan import ScanResult, foreground_share, scan
from pdrunet_jax.data.split import Sample, assign, manifest_rows, overlaps, split_counts, together
from pdrunet_jax.data.walk import files_below, some
from pdrunet_jax.runtime.errors import DataError, UserError
from pdrunet_jax.runtime.files import new_folder, require_vacant

HELP = """\
Import MURA's radiographs, with masks from elsewhere, as a dataset folder. MURA has no masks of its own.

MURA-v1.1 is free of charge after registration: https://stanfordmlgroup.github.io/competitions/mura/

Its licence forbids redistribution, so DST refers to the images instead of copying them.

Masks for humerus and forearm (CC BY 4.0): the FleXray data release, folder mura_forearm_humerus_annotations,
    https://huggingface.co/datasets/VictorButoi/flexray-data

Or draw your own in LabelMe.

Example:
    python -m pdrunet_jax.data import-mura MURA-v1.1 data/mura --region XR_HUMERUS --masks annotations
    python -m pdrunet_jax.data check data/mura
    python -m pdrunet_jax.train --config mura --data.root data/mura

A mask is a LabelMe file or an image. Its name is the path of its image in MURA, as folders or in one file name:
    train/XR_HUMERUS/patient00001/study1_positive/image1.json
    train_XR_HUMERUS_patient00001_study1_positive_image1_mask.png

Hyphens and dots may join the parts, too. Split, region, and positive or negative may be missing if the rest still \
identifies one image; _mask, _seg or _label may follow. A LabelMe file with another name is matched by its imagePath. \
If there are LabelMe files, images next to them are not masks.

Patients of MURA's train become train and val, patients of its valid become test; none is in two splits. \
Images without a mask are counted and left out. Masks without an image are errors, reported all at once."""

REGIONS = ("ELBOW", "FINGER", "FOREARM", "HAND", "HUMERUS", "SHOULDER", "WRIST")

_LICENCE = (
    "Images: MURA (Stanford ML Group), for research, by reference, not to be redistributed; masks: see their source"
)

_VIEW = re.compile(
    r"(?:(?P<split>train|valid)[/_.-]+)?"
    r"(?:(?P<region>XR[_-][A-Z]+)[/_.-]+)?"
    r"(?P<patient>patient\d+)[/_.-]+"
    r"(?P<study>study\d+)(?:[_-](?P<finding>positive|negative))?[/_.-]+"
    r"(?P<image>image\d+)(?:_mask|_seg|_label)?$",
    re.IGNORECASE,
)
"""Path of an image in MURA without its extension, also with other separators, or without its first folders."""


@dataclass(frozen=True)
class ImportMura:
    """Import MURA's radiographs, with masks from elsewhere, as a dataset folder."""

    source: Source
    """MURA's folder, which has train/ and valid/, or its parent."""
    dst: Target
    """Dataset folder to write; must be empty or not exist."""
    masks: Path
    """Folder with the LabelMe files or mask images."""
    region: tuple[str, ...] = ("XR_HUMERUS",)
    """One or more of XR_ELBOW, XR_FINGER, XR_FOREARM, XR_HAND, XR_HUMERUS, XR_SHOULDER, XR_WRIST."""
    classes: dict[str, int | str] = field(default_factory=dict)
    """LabelMe: labels with mask values. Mask images: class names with a grey value, palette index, "#rrggbb" colour,
    or several (1,2)."""
    ignore: int | str | None = None
    """Value or colour in mask images that is excluded from loss and metrics."""
    threshold: int | None = None
    """Grey value (of 255) from which a soft-edged mask image counts as foreground; by default 128."""
    boxes: Boxes = "drop"
    """LabelMe rectangles around another shape with the same label: drop them as boxes, or keep them as regions."""
    val_fraction: float = 0.2
    """Fraction of the patients of MURA's train that become val."""
    split_seed: int = 0
    """Seed for drawing these patients."""


@dataclass(frozen=True)
class View:
    """One of MURA's images."""

    split: str
    """MURA's own split, "train" or "valid"."""
    region: str
    patient: str
    study: str
    finding: str
    image: str
    path: Path

    @property
    def name(self) -> str:
        """The image's path in MURA, without the extension."""
        study = f"{self.study}_{self.finding}" if self.finding else self.study
        return f"{self.split}/{self.region}/{self.patient}/{study}/{self.image}"


def import_mura(options: ImportMura) -> list[str]:
    """Write the dataset folder `options.dst`, completely or not at all: masks, and references to the images.

    Mask images are copied as they are; LabelMe files become index masks. Returns remarks for the user. Raises
    `UserError`, or `DataError` with all problems.
    """
    require_vacant(options.dst)
    if not 0 <= options.val_fraction < 1:
        raise UserError(f"--val-fraction {options.val_fraction} must be at least 0 and less than 1")
    if options.threshold is not None and not 0 < options.threshold < 256:
        raise UserError(f"--threshold {options.threshold} must be a grey value from 1 to 255")
    # Find the images, and the mask of each.
    chosen = list(dict.fromkeys(_region(name) for name in options.region))
    root = mura_root(options.source, options.masks)
    if not options.masks.is_dir():
        raise UserError(f"--masks {options.masks} is not a folder; name the one with the LabelMe files or mask images")
    views = find_views(root, chosen)
    if not views:
        raise UserError(f"{root} has no images of {', '.join(chosen)} (train/XR_*/patient*/study*/image*.png)")
    matched, notes, problems = match_masks(options.masks, views, chosen)
    if not matched and not problems:
        words = f"no LabelMe file and no mask image of {', '.join(chosen)} in it or below"
        raise UserError(f"--masks {options.masks}: {words}")
    if without := len(views) - len(matched):
        notes.append(f"{without} of {len(views)} images have no mask and are left out")
    with new_folder(options.dst) as folder:
        # Read everything, so that all problems are reported at once.
        files, ignore, threshold = matched, options.ignore, options.threshold
        classes: Mapping[str, int | str] = options.classes
        if drawn := any(path.suffix.lower() == ".json" for path in matched.values()):
            files, table, more = _draw(matched, options, folder, problems)
            classes, ignore, threshold = table.classes, IGNORE if IGNORE in table.index_of.values() else None, None
            notes += more
        coding = declare(classes, ignore, threshold, source="--classes")
        pairs = {
            view: Pair(view.name, view.path, os.path.relpath(files[view], options.masks), files[view])
            for view in views
            if view in files
        }
        scanned = dict(zip(pairs, scan(list(pairs.values()), coding, DataConfig().threads), strict=True))
        problems += [problem for item in scanned.values() for problem in item.problems]
        try:
            coding, more = resolve(coding, [(pairs[view].mask_id, item.codes) for view, item in scanned.items()])
            notes += more
        except DataError as error:
            problems += error.problems
        both = overlaps([view.name for view in views], [view.patient for view in views], [view.split for view in views])
        problems += [f"patient in MURA's train and valid: {' and '.join(where.values())}" for where in both.values()]
        if problems:
            raise DataError(f"{options.source}: {len(problems)} problem{'s' * (len(problems) > 1)}", problems)
        # Draw the split by patient and share of foreground, and write the rest.
        tested = {item.pixels for view, item in scanned.items() if view.split == "valid"}
        twins = [view for view, item in scanned.items() if view.split == "train" and item.pixels in tested]
        if twins:
            notes.append(f"left out of train because valid has the same pixels: {some([view.name for view in twins])}")
        kept = {view: item for view, item in scanned.items() if view not in twins}
        splits = _splits(kept, coding, options)
        samples = []
        for view in kept:
            mask = folder / "masks" / f"{view.name}{files[view].suffix.lower()}"
            if not drawn:
                mask.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(files[view], mask)
            image = Path(os.path.abspath(view.path)).as_posix()
            samples.append(Sample(image, view.path, mask, view.patient, splits[view]))
        write_manifest(folder, manifest_rows(folder, samples))
        name = "_".join(["mura", *(region.removeprefix("XR_").lower() for region in chosen)])
        classes = classes or {name: colour_name(codes[0]) or codes[0] for name, codes in coding.classes}
        write_description(folder, name, classes, ignore=ignore, threshold=threshold, licence=_LICENCE)
    empty = [split for split in ("train", "test") if not any(sample.split == split for sample in samples)]
    if empty:
        notes.append(f"warning: no image with a mask is left for {' and '.join(empty)}")
    return [*notes, split_counts(samples), f"{len(samples)} images, classes {', '.join(coding.names)}"]


def mura_root(source: Path, masks: Path) -> Path:
    """The folder with MURA's train/ and valid/: `source`, or a folder in it other than `masks`. Raises `UserError`."""
    if _is_root(source):
        return source
    inside = sorted(source.iterdir()) if source.is_dir() else []
    found = [folder for folder in inside if _is_root(folder) and folder.resolve() != masks.resolve()]
    if len(found) > 1:
        raise UserError(f"{source} has several folders like MURA: {', '.join(map(str, found))}; name one")
    if not found:
        raise UserError(
            f"{source} is not MURA: neither it nor a folder in it has train/XR_* or valid/XR_*.\n"
            "MURA is free of charge after registration: https://stanfordmlgroup.github.io/competitions/mura/"
        )
    return found[0]


def find_views(root: Path, regions: Iterable[str]) -> list[View]:
    """MURA's images of `regions`, in the order of their paths."""
    views = []
    for split in ("train", "valid"):
        for region in regions:
            folder = root / split / region
            for path in files_below(folder) if folder.is_dir() else ():
                match = _VIEW.fullmatch(path.relative_to(root).with_suffix("").as_posix())
                if match and path.suffix.lower() in SUFFIXES:
                    parts = {key: value.lower() for key, value in match.groupdict("").items()}
                    views.append(View(**{**parts, "split": split, "region": region}, path=path))
    return views


def match_masks(
    folder: Path, views: Sequence[View], regions: Sequence[str]
) -> tuple[dict[View, Path], list[str], list[str]]:
    """Match masks to views by name; returns the mask of each view that has one, notes, and problems."""
    candidates, problems = _candidates(folder, views)
    by_core: dict[tuple[str, str, str], list[View]] = defaultdict(list)
    for view in views:
        by_core[view.patient, view.study, view.image].append(view)
    matched: dict[View, Path] = {}
    elsewhere: Counter[str] = Counter()
    for path, words in candidates:
        name = path.relative_to(folder).as_posix()
        match = _VIEW.search(words)
        if not match:
            problems.append(f"{name}: {words} is not the path of an image in MURA")
            continue
        named = {key: value.lower() for key, value in match.groupdict("").items()}
        region = named["region"].replace("-", "_").upper()
        if region and region not in regions:
            elsewhere[region] += 1
            continue
        found = [
            view
            for view in by_core.get((named["patient"], named["study"], named["image"]), [])
            if named["split"] in ("", view.split)
            and named["finding"] in ("", view.finding)
            and region in ("", view.region)
        ]
        if len(found) != 1:
            where = ", ".join(view.name for view in found)
            reason = f"fits several images: {where}" if found else f"a mask without an image ({match.group(0)})"
            problems.append(f"{name}: {reason}")
        elif found[0] in matched:
            first = matched[found[0]].relative_to(folder).as_posix()
            problems.append(f"{name}: {found[0].name} already has a mask: {first}")
        else:
            matched[found[0]] = path
    notes = [f"{count} masks of {region} are left out: not in --region" for region, count in sorted(elsewhere.items())]
    return matched, notes, problems


def _is_root(folder: Path) -> bool:
    return any(path.is_dir() for split in ("train", "valid") for path in (folder / split).glob("XR_*"))


def _candidates(folder: Path, views: Sequence[View]) -> tuple[list[tuple[Path, str]], list[str]]:
    """LabelMe files below `folder` or else images, each with the text that may be MURA's path; and problems."""
    originals = {os.path.realpath(view.path) for view in views}
    drawn: list[tuple[Path, str]] = []
    images: list[tuple[Path, str]] = []
    problems: list[str] = []
    for path in files_below(folder):
        name = path.relative_to(folder)
        words = name.with_suffix("").as_posix()
        if path.suffix.lower() in SUFFIXES and os.path.realpath(path) not in originals:
            images.append((path, words))
        elif path.suffix.lower() == ".json" and _VIEW.search(words):
            drawn.append((path, words))
        elif path.suffix.lower() == ".json":
            try:
                annotation = read_annotation(path, name.as_posix())
            except DataError as error:
                problems += error.problems
                continue
            if annotation is not None:  # else other JSON
                words = str(PurePosixPath(annotation.image_path.replace("\\", "/")).with_suffix(""))
                drawn.append((path, words))
    return drawn or images, problems


def _region(name: str) -> str:
    word = name.upper().removeprefix("XR_")
    if word not in REGIONS:
        raise UserError(f"--region {name}: MURA's are {', '.join(f'XR_{region}' for region in REGIONS)}")
    return f"XR_{word}"


def _draw(
    matched: Mapping[View, Path], options: ImportMura, folder: Path, problems: list[str]
) -> tuple[dict[View, Path], LabelTable, list[str]]:
    """Draw LabelMe files as index masks in `folder`; returns them, the table of labels, and notes."""
    numbers = {label: value for label, value in options.classes.items() if isinstance(value, int)}
    if len(numbers) < len(options.classes):
        raise UserError("--classes: LabelMe labels need numbers, such as --classes humerus 1 ulna 2")
    check_classes(numbers)
    survey, annotations = Survey(), {}
    for view, path in matched.items():
        name = path.relative_to(options.masks).as_posix()
        try:
            if (annotation := read_annotation(path, name)) is None:
                raise DataError("unreadable annotation", [f"{name}: JSON, but not a LabelMe file"])
            annotations[view] = survey.add(annotation, options.boxes)
        except DataError as error:
            problems += error.problems
    table = label_table(survey.labels, numbers)
    problems += table.problems
    index_of = {label: table.index_of.get(label, 0) for label in survey.labels}
    files = {}
    for view, annotation in annotations.items():
        try:
            height, width = decode_image(read_bytes(view.path, view.name), view.name)[0].shape[:2]
            annotation.check_size(height, width, "the image")
            mask = rasterise(annotation.shapes, index_of, (height, width), annotation.name)
        except DataError as error:
            problems += error.problems
            continue
        files[view] = folder / "masks" / f"{view.name}.png"
        write_mask(mask, files[view])
    return files, table, [*table.notes, *survey.notes()]


def _splits(kept: Mapping[View, ScanResult], coding: MaskCoding, options: ImportMura) -> dict[View, str]:
    """Our splits for MURA's: train becomes train and val, by patient; valid becomes test."""
    train = [view for view in kept if view.split == "train"]
    groups = together([view.patient for view in train], [kept[view].pixels for view in train])
    shares = [foreground_share(kept[view].codes, coding) for view in train]
    chosen = assign(groups, shares, val=options.val_fraction, test=0.0, seed=options.split_seed)
    return dict.fromkeys(kept, "test") | {view: chosen[group] for view, group in zip(train, groups, strict=True)}
