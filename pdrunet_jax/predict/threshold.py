"""Decision threshold: apply it, check it, store it with the weights.

At the end of training the threshold with the best Dice on the validation images is stored in `best.safetensors`;
`--threshold validation` of evaluate, predict and export uses it. It is never chosen on test images: a threshold chosen
on the images that it is scored on makes the score look better than it is.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pdrunet_jax.model.files import read_weights, write_safetensors
from pdrunet_jax.runtime.digest import CONTENT, content_digest
from pdrunet_jax.runtime.errors import UserError

Threshold = float | Literal["validation"]
"""Value of the option `--threshold`."""

THRESHOLD_KEY = "threshold"  # in the options of a weights file


def apply_threshold(probability: np.ndarray, threshold: float = 0.5) -> np.ndarray:
    """Class indices (H, W), uint8: probabilities (H, W) above `threshold`, or the argmax of (H, W, K)."""
    classes = probability > threshold if probability.ndim == 2 else probability.argmax(axis=-1)
    return np.asarray(classes, np.uint8)


def check_threshold(threshold: float, outputs: int = 1) -> None:
    """Raise `UserError` if `threshold` is not a probability, or is set for a model with several outputs."""
    if not 0 <= threshold <= 1:
        raise UserError(f"threshold {threshold}: give a probability between 0 and 1")
    if outputs > 1 and threshold != 0.5:
        raise UserError(
            f"threshold {threshold}: the model has {outputs} outputs and takes the most probable class; "
            "leave the threshold out"
        )


def store_threshold(path: Path, threshold: float) -> bool:
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
    if options.get(THRESHOLD_KEY) != threshold:
        options[THRESHOLD_KEY] = threshold
        write_safetensors(path, file.arrays, {**options, CONTENT: content_digest(file.arrays, options)})
    return True


def resolve_threshold(given: Threshold, known: Mapping[str, Any], weights: str | Path) -> float:
    """The number that `--threshold` stands for, given the options `known` that are stored with `weights`.

    Raises `UserError` if it is not a probability, if the model has several outputs, or if it is "validation" and no
    threshold is stored.
    """
    outputs = known.get("outputs", 1)
    if given != "validation":
        check_threshold(given, outputs)
        return given
    if outputs > 1:
        raise UserError(
            f"--threshold validation: {weights} has {outputs} outputs and takes the most probable class; "
            "leave the option out"
        )
    chosen = known.get(THRESHOLD_KEY)
    if isinstance(chosen, bool) or not isinstance(chosen, int | float) or not 0 <= chosen <= 1:
        raise UserError(
            f"--threshold validation: {weights} contains no threshold. Training stores one in best.safetensors when it "
            "finishes; for a run without one, start the same training command again, or give a number"
        )
    return float(chosen)
