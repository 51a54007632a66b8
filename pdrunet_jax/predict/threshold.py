"""Decision threshold: apply it, check it, store it with the weights.

At the end of training the threshold with the best Dice on the validation images is stored in `best.safetensors`;
`--threshold validation` of evaluate, predict and export uses it. It is never chosen on test images: a threshold chosen
on the images that it is scored on makes the score look better than it is.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from pdrunet_jax.model.files import read_weights, write_safetensors
from pdrunet_jax.runtime.digest import CONTENT, content_digest
from pdrunet_jax.runtime.errors import UserError

Threshold = Annotated[float | str, tyro.conf.arg(metavar="FLOAT|validation|CLASS=FLOAT,...")]
"""Value of the option `--threshold`."""

THRESHOLD_KEY = "threshold"  # in the options of a weights file


def apply_threshold(
    probability: np.ndarray, threshold: float | tuple[float, ...] = 0.5, *, multilabel: bool = False
) -> np.ndarray:
    """Class indices (H, W), uint8: probabilities (H, W) above `threshold`, or the argmax of (H, W, K).

    If classes overlap (`multilabel`), layers (H, W, K) of 0 and 1 instead; `threshold` is one for all or one for each.
    """
    if multilabel:
        return np.asarray(probability > np.asarray(threshold, np.float32), np.uint8)
    classes = probability > threshold if probability.ndim == 2 else probability.argmax(axis=-1)
    return np.asarray(classes, np.uint8)


def check_threshold(threshold: float | tuple[float, ...], outputs: int = 1, *, multilabel: bool = False) -> None:
    """Raise `UserError` if `threshold` is not a probability, or is set for a model with several exclusive classes.

    A model of overlapping classes takes one for all or one for each.
    """
    each = threshold if isinstance(threshold, tuple) else (threshold,)
    if not all(0 <= value <= 1 for value in each):
        raise UserError(f"threshold {thresholds_text(threshold)}: give a probability between 0 and 1")
    if isinstance(threshold, tuple) and not (multilabel and len(threshold) == outputs):
        raise UserError(f"{len(threshold)} thresholds for a model with {outputs} outputs: give one")
    if outputs > 1 and not multilabel and threshold != 0.5:
        raise UserError(
            f"threshold {threshold}: the model has {outputs} outputs and takes the most probable class; "
            "leave the threshold out"
        )


def thresholds_text(threshold: float | tuple[float, ...], names: Sequence[str] = ()) -> str:
    """One threshold, or one for each class, as `--threshold` takes it if the `names` of the classes are given."""
    if not isinstance(threshold, tuple):
        return f"{threshold:g}"
    if not names:
        return " ".join(f"{value:g}" for value in threshold)
    return ",".join(f"{name}={value:g}" for name, value in zip(names, threshold, strict=True))


def store_threshold(path: Path, threshold: float | tuple[float, ...]) -> bool:
    """Store `threshold` in the header of a `.safetensors` file, atomically, and update the digest.

    Returns False and leaves the file alone if its digest does not match: a new digest would hide the damage. Raises
    `RunError` if the file cannot be written.
    """
    try:
        file = read_weights(path)
    except UserError:
        return False
    options = dict(file.options)
    if options.pop(CONTENT, None) != content_digest(file.arrays, options):
        return False
    stored = list(threshold) if isinstance(threshold, tuple) else threshold
    if options.get(THRESHOLD_KEY) != stored:
        options[THRESHOLD_KEY] = stored
        write_safetensors(path, file.arrays, {**options, CONTENT: content_digest(file.arrays, options)})
    return True


def resolve_threshold(given: float | str, known: Mapping[str, Any], weights: str | Path) -> float | tuple[float, ...]:
    """The number that `--threshold` stands for, given the options `known` that are stored with `weights`.

    It is one number a class if classes overlap, for "validation" and for "bone=0.4,implant=0.6".

    Raises `UserError` if it is not a probability, if the model has several outputs, or if it is "validation" and no
    threshold is stored.
    """
    outputs, multilabel = known.get("outputs", 1), bool(known.get("multilabel", False))
    if isinstance(given, str) and outputs > 1 and not multilabel:
        raise UserError(
            f"--threshold {given}: {weights} has {outputs} outputs and takes the most probable class; "
            "leave the option out"
        )
    if given != "validation":
        numbers = _by_class(given, known.get("class_names") or ()) if isinstance(given, str) else given
        at = numbers[0] if isinstance(numbers, tuple) and outputs == 1 else numbers
        check_threshold(at, outputs, multilabel=multilabel)
        return at
    chosen = known.get(THRESHOLD_KEY)
    each: list[Any] = chosen if multilabel and isinstance(chosen, list) and len(chosen) == outputs else [chosen]
    if any(isinstance(at, bool) or not isinstance(at, int | float) or not 0 <= at <= 1 for at in each):
        raise UserError(
            f"--threshold validation: {weights} contains no threshold. Training stores one in best.safetensors when it "
            "finishes; for a run without one, start the same training command again, or give a number"
        )
    return tuple(map(float, each)) if multilabel else float(each[0])


def _by_class(text: str, names: Sequence[str]) -> tuple[float, ...]:
    """The thresholds of the classes `names`, in their order, from "bone=0.4,implant=0.6". Raises `UserError`."""
    parts = [part.rpartition("=") for part in text.split(",")]
    try:
        at = {name.strip(): float(value) for name, _, value in parts}
    except ValueError:
        at = {}
    if len(at) != len(parts) or at.keys() != {*names}:
        example = ",".join(f"{name}=0.5" for name in names) if names else "CLASS=0.5"
        raise UserError(f"--threshold {text}: give a probability, validation, or one for each class: {example}")
    return tuple(at[name] for name in names)
