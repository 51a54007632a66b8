"""Score masks that were made elsewhere: a folder of predictions against the masks of a dataset."""

import json
import zlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from pdrunet_jax.config import MaskValue
from pdrunet_jax.data.dataset import Dataset
from pdrunet_jax.data.images import SUFFIXES, read_bytes
from pdrunet_jax.data.masks import IGNORE, MaskCoding, codes_to_classes, declare, decode_codes, read_mask
from pdrunet_jax.data.walk import files_below, some
from pdrunet_jax.evaluate import scores
from pdrunet_jax.evaluate.evaluation import Evaluation, EvaluationOptions, read_spacings
from pdrunet_jax.evaluate.scores import ScoringOptions
from pdrunet_jax.predict.outputs import LABELME_PICTURE, MASK, OVERLAY, RECORD_KEY
from pdrunet_jax.predict.postprocess import clean
from pdrunet_jax.runtime.errors import DataError, UserError

_ENDINGS = ("", "_mask", "_seg", "_label", "_pred", "_prediction")


def evaluate_predictions(
    folder: Path,
    dataset: Dataset,
    split: str,
    options: EvaluationOptions,
    classes: Mapping[str, MaskValue],
) -> tuple[Evaluation, list[str]]:
    """Score the masks in `folder` against those of the dataset's `split`; returns the scores and remarks.

    A prediction has the name of its image, as the dataset's masks have. Its values mean what `classes` declares, what
    the predict command recorded in it, or else what they mean in the dataset's masks. The evaluation has no curves,
    which need probabilities.

    Raises `UserError` if the split is empty or classes overlap, `DataError` for predictions that are missing, cannot be
    read, or have another size than the mask.
    """
    samples = dataset.of(split)
    if not samples:
        raise UserError(f"{dataset.root} has no images in the split {split}; use another --split, or all")
    if dataset.multilabel:
        raise UserError("--predictions: masks of overlapping classes (data.multilabel) are not read; score one class")
    if not folder.is_dir():
        raise UserError(f"--predictions {folder} is not a folder; name the one with the predicted masks")
    paths, notes = match_predictions(folder, dataset, split)
    masks, more = _Reader(dataset, classes).read_all(paths)
    spacings, unit, unit_note = read_spacings(dataset, samples)
    rules = ScoringOptions(unit, options.tolerance, options.empty_dice)
    rows, problems = [], []
    for sample in samples:
        truth = read_mask(sample.mask, dataset.coding)
        predicted = np.frombuffer(zlib.decompress(masks[sample.id][0]), np.uint8).reshape(masks[sample.id][1])
        if predicted.shape != truth.shape:
            sizes = [f"{width}x{height}" for height, width in (predicted.shape, truth.shape)]
            problems.append(f"{paths[sample.id]}: {sizes[0]} pixels, but the mask of {sample.id} has {sizes[1]}")
            continue
        predicted = clean(predicted, options.cleaning)
        masks[sample.id] = zlib.compress(predicted.tobytes(), 1), predicted.shape
        spacing = spacings.get(sample.id)
        rows += scores.score(sample.id, sample.patient, predicted, truth, dataset.class_names, rules, spacing)
    if problems:
        raise DataError(f"--predictions {folder}: {len(problems)} problem{'s' * (len(problems) > 1)}", problems)
    compressed = {name: data for name, (data, _) in masks.items()}
    summary = scores.summarise(rows, rules)
    return Evaluation(dataset, split, tuple(rows), summary, compressed, unit_note, {}), [*notes, *more]


def match_predictions(folder: Path, dataset: Dataset, split: str) -> tuple[dict[str, Path], list[str]]:
    """The prediction of each sample, by its id, and remarks. Raises `DataError` that names those without one.

    A name is compared with the image's path below images/ and, if that is unique, with its file name.
    """
    found: dict[str, list[Path]] = defaultdict(list)
    for path in files_below(folder):
        pictures = (OVERLAY, LABELME_PICTURE)  # of the predict command, like its probabilities
        if path.suffix.lower() in SUFFIXES and not path.name.endswith(pictures) and "_probability" not in path.stem:
            key = path.relative_to(folder).with_suffix("").as_posix()
            for ending in _ENDINGS:
                if key.lower().endswith(ending):
                    found[key[: len(key) - len(ending)].casefold()].append(path)
    by_name: dict[str, set[Path]] = defaultdict(set)
    for key, paths in found.items():
        by_name[PurePosixPath(key).name] |= set(paths)
    keys = {sample.id: _keys(sample.id) for sample in dataset.samples}
    names: dict[str, list[str]] = defaultdict(list)
    for identity, (first, *_) in keys.items():
        names[PurePosixPath(first).name].append(identity)
    result, used, problems = {}, set(), []
    for sample in dataset.samples:
        candidates = next((found[key] for key in keys[sample.id] if key in found), [])
        name = PurePosixPath(keys[sample.id][0]).name
        if not candidates and len(names[name]) == 1:
            candidates = sorted(by_name.get(name, ()))
        used |= set(candidates)
        if split not in (sample.split, "all"):
            continue
        if len(candidates) == 1:
            result[sample.id] = candidates[0]
        elif candidates:
            problems.append(f"{sample.id}: several predictions: {some([str(path) for path in candidates])}")
        else:
            problems.append(f"{sample.id}: no prediction named {name}.*, {name}_mask.* or the like")
    every = {path for paths in found.values() for path in paths}
    extra = sorted(path.relative_to(folder).as_posix() for path in every - used)
    if problems:
        listed = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        listed += [f"predictions without an image: {some(extra)}"] if extra else []
        raise DataError(f"--predictions {folder}: {len(problems)} of the {split} images", listed)
    return result, [f"{len(extra)} predictions have no image in the dataset: {some(extra)}"] if extra else []


def _keys(identity: str) -> list[str]:
    """Paths, without extension and in lower case, that a prediction of a sample may have."""
    path = PurePosixPath(identity).with_suffix("")
    parts = [part for part in path.parts if part not in ("/", "images", "imagesTr", "imagesTs")]
    names = [path.as_posix(), "/".join(parts)]
    names += [name[: -len("_0000")] for name in names if name.endswith("_0000")]  # nnU-Net's first channel
    return [name.casefold() for name in names]


class _Reader:
    """Reads predictions, all with the same meaning of values."""

    def __init__(self, dataset: Dataset, classes: Mapping[str, MaskValue]) -> None:
        self._dataset = dataset
        names = dataset.class_names
        indices = MaskCoding(tuple((name, (index,)) for index, name in enumerate(names, start=1)), background=(0,))
        if classes:
            declared = declare(classes, source="--prediction-classes")
            if set(declared.names) != set(names):
                stated = f"{', '.join(declared.names)}, but {dataset.root} has {', '.join(names)}"
                raise UserError(f"--prediction-classes declares {stated}")
            ordered = tuple((name, dict(declared.classes)[name]) for name in names)
            background = declared.background or ((0,) if not declared.colours else (1 << 24,))
            self._codings = [("", replace(declared, classes=ordered, background=background))]
            return
        self._codings = [("", dataset.coding), (f"values are class indices ({', '.join(names)})", indices)]
        if len(names) == 1:
            everything = MaskCoding(((names[0], (IGNORE,)),), background=(0,))
            self._codings.append((f"255 was taken as {names[0]}", everything))

    def read_all(self, paths: Mapping[str, Path]) -> tuple[dict[str, tuple[bytes, tuple[int, ...]]], list[str]]:
        """Class indices of every prediction, compressed, with their shapes, by sample id; and remarks."""
        problems: list[str] = []
        for remark, coding in self._codings:
            masks, ignored, wrong = {}, 0, list[str]()
            for identity, path in paths.items():
                try:
                    mask = self._read(path, coding)
                except DataError as error:
                    wrong += error.problems
                    continue
                ignored += int(np.count_nonzero(mask == IGNORE))
                mask[mask == IGNORE] = 0
                masks[identity] = zlib.compress(mask.tobytes(), 1), mask.shape
            if not wrong:
                notes = [f"predictions: {remark}"] if remark else []
                return masks, [*notes, *([f"predictions: {ignored} ignored pixels are background"] if ignored else [])]
            problems = problems or wrong
        known = "; ".join(f"{name} = {' or '.join(map(str, codes))}" for name, codes in self._dataset.coding.classes)
        remedy = f"the dataset's masks have {known}. Say what the values mean with --prediction-classes NAME VALUE ..."
        raise DataError("unreadable predictions", [*problems, remedy])

    def _read(self, path: Path, coding: MaskCoding) -> np.ndarray:
        """Class indices of a prediction. Raises `DataError`."""
        recorded = _recorded_names(path)
        names = self._dataset.class_names
        if recorded is not None:
            if set(recorded) != set(names):
                words = f"predicted with the classes {', '.join(recorded)}; the dataset has {', '.join(names)}"
                raise DataError("prediction", [f"{path}: {words}"])
            places = {name: (index,) for index, name in enumerate(recorded, start=1)}
            coding = MaskCoding(tuple((name, places[name]) for name in names), background=(0,))
        codes = decode_codes(read_bytes(path, str(path)), str(path), coding)
        return codes_to_classes(codes, coding, str(path))


def _recorded_names(path: Path) -> list[str] | None:
    """Names of the classes in a mask of the predict command, in the order of their indices; None for other files."""
    if not path.name.endswith(MASK) or not path.is_file():
        return None
    try:
        with Image.open(path, formats=("PNG",)) as image:  # reads no pixels
            record = json.loads(image.info.get(RECORD_KEY, "null"))
    except (OSError, ValueError, SyntaxError):
        return None
    pixels = record.get("pixels") if isinstance(record, dict) else None
    return list(pixels) if isinstance(pixels, dict) and pixels else None
