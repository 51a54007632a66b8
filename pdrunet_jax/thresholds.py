"""The threshold that scores best on the validation images: found when training ends, kept with the best weights.

`--threshold validation` of `evaluate`, `predict` and `export` takes it from there. It is never chosen on test images:
whatever is chosen on the images that it is scored on flatters the score.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pdrunet_jax.calibration import THRESHOLDS, Curves, Histogram
from pdrunet_jax.config import DataConfig
from pdrunet_jax.data.dataset import Dataset
from pdrunet_jax.data.masks import IGNORE
from pdrunet_jax.errors import UserError
from pdrunet_jax.inference import check_threshold
from pdrunet_jax.integrity import CONTENT, content_digest
from pdrunet_jax.model import PDRUNet
from pdrunet_jax.stopping import StopFlag
from pdrunet_jax.weight_files import read_weights, write_safetensors

Threshold = float | Literal["validation"]
"""What `--threshold` takes."""

KEY = "threshold"
"""Of the options in a file of weights."""


class Choice(NamedTuple):
    """The best threshold of the validation images."""

    threshold: float
    """One of `pdrunet_jax.calibration.THRESHOLDS`; of several that are best the one nearest 0.5."""
    dice: float
    """Mean Dice of the validation images at it, at their own resolution."""
    dice_at_half: float
    """The same at 0.5."""

    @classmethod
    def of(cls, curves: Curves) -> "Choice":
        """From the threshold curve of at least one image."""
        return cls(*curves.best, curves.dice[THRESHOLDS.index(0.5)])


def choose_threshold(
    model: PDRUNet, dataset: Dataset, config: DataConfig, *, batch_size: int = 8, stop: StopFlag | None = None
) -> Choice | None:
    """The threshold with the highest mean Dice of the validation images; None if it was `stop`ped.

    Args:
        model: Of one output.
        dataset: From `open_dataset`, with validation images.
        config: How images are read and the size that the network works at.
        batch_size: Images in each batch.
        stop: Becomes true when the program is asked to stop.
    """
    from pdrunet_jax.evaluation import predicted_probabilities

    histogram = Histogram()
    for _, probability, truth in predicted_probabilities(model, dataset, "val", config, batch_size=batch_size):
        if stop:
            return None
        counted = truth != IGNORE
        histogram.add(probability[counted], truth[counted] > 0)
    return Choice.of(histogram.curves())


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
    if options.get(KEY) != threshold:
        options[KEY] = threshold
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
    chosen = known.get(KEY)
    if isinstance(chosen, bool) or not isinstance(chosen, int | float) or not 0 <= chosen <= 1:
        raise UserError(
            f"--threshold validation: {weights} holds no threshold. Training stores it in best.safetensors when it "
            "ends; the same training command, started again, adds it to a run that has none. Or give a number"
        )
    return float(chosen)
