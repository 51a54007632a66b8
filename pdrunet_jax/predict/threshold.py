"""The threshold that scores best on the validation images: found when training ends, kept with the best weights.

`--threshold validation` of `evaluate`, `predict` and `export` takes it from there. It is never chosen on test images:
whatever is chosen on the images that it is scored on flatters the score.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pdrunet_jax.model.files import read_weights, write_safetensors
from pdrunet_jax.runtime.digest import CONTENT, content_digest
from pdrunet_jax.runtime.errors import UserError


def apply_threshold(probability: np.ndarray, threshold: float = 0.5) -> np.ndarray:
    """Class indices (H, W) uint8 of probabilities (H, W), above `threshold`, or (H, W, K), the likeliest."""
    decided = probability > threshold if probability.ndim == 2 else probability.argmax(axis=-1)
    return np.asarray(decided, np.uint8)


def check_threshold(threshold: float, outputs: int = 1) -> None:
    """Raise `UserError` if `threshold` is no probability, or is set for a model whose classes compete."""
    if not 0 <= threshold <= 1:
        raise UserError(f"threshold {threshold}: a probability lies between 0 and 1")
    if outputs > 1 and threshold != 0.5:
        raise UserError(f"threshold {threshold}: the model has {outputs} outputs, of which the likeliest wins")


Threshold = float | Literal["validation"]
"""What `--threshold` takes."""

THRESHOLD_KEY = "threshold"
"""Of the options in a file of weights."""


def store_threshold(path: Path, threshold: float) -> bool:
    """Keep `threshold` in the header of a `.safetensors` file, which is replaced in one step, its digest renewed.

    A file whose digest does not match is left alone, and False returned: a new digest would hide the damage. Raises
    `RunError` if it cannot be written.
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
    """The number that `--threshold` means for `weights`, whose options (of `load_options`) are `known`.

    Raises `UserError` if it is no probability, if several classes compete, or if "validation" was given and the
    weights hold no threshold.
    """
    outputs = known.get("outputs", 1)
    if given != "validation":
        check_threshold(given, outputs)
        return given
    if outputs > 1:
        raise UserError(
            f"--threshold validation: {weights} has {outputs} outputs, of which the likeliest wins; leave it out"
        )
    chosen = known.get(THRESHOLD_KEY)
    if isinstance(chosen, bool) or not isinstance(chosen, int | float) or not 0 <= chosen <= 1:
        raise UserError(
            f"--threshold validation: {weights} holds no threshold. Training stores it in best.safetensors when it "
            "ends; the same training command, started again, adds it to a run that has none. Or give a number"
        )
    return float(chosen)
