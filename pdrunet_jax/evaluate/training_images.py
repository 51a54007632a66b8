"""Which images a run was trained on, so that it is not scored on them by mistake.

The run folder holds a digest of the decoded pixels of each: renaming, copying or mounting the data elsewhere does not
change it.
"""

from collections.abc import Sequence
from pathlib import Path

from pdrunet_jax.data.dataset import Dataset
from pdrunet_jax.data.split import Sample
from pdrunet_jax.data.walk import some
from pdrunet_jax.model.folds import find_folds
from pdrunet_jax.model.load import find_run
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.files import atomic_write, is_present, writing
from pdrunet_jax.runtime.opening import read_regular
from pdrunet_jax.runtime.run_folder import RunFolder

_DIGITS = 16  # of the digest: two of a million images would agree once in 10 million data sets
_HEADER = "# SHA-256 of the pixels of each training image, first 16 digits. evaluate refuses to score these images.\n"


def write_training_images(run: RunFolder, dataset: Dataset, earlier: str | None = None) -> None:
    """Write the list of a run, with the images that its initial weights `earlier` were trained on.

    Raises `RunError` if it cannot be written.
    """
    digests = {_short(sample) for sample in dataset.of("train")}
    digests |= (_read(earlier) or set()) if earlier else set()
    text = _HEADER + "".join(f"{digest}\n" for digest in sorted(digests))
    with writing(run.training_images):
        atomic_write(run.training_images, text)


def require_unseen(weights: str | Path, samples: Sequence[Sample], dataset: Dataset) -> None:
    """Raise `UserError` if the run of `weights` was trained on some of the `samples`; nothing is known of other files.

    The split of a dataset is no protection: the same images may be in another one there. In a folder of folds, every
    fold counts.
    """
    runs = find_folds(weights)
    if seen := seen_in_training(weights, samples):
        folds = "--split out-of-fold to score each with the fold that has not seen it, " if runs else ""
        raise UserError(
            f"{weights} was trained on {len(seen)} of the {len(samples)} images of {dataset.root} to score: "
            f"{some(seen)}. Scores on them say nothing about new images. Choose {folds}other images, --split train if "
            "you mean to score the training images, or --allow-training-images"
        )


def seen_in_training(weights: str | Path, samples: Sequence[Sample]) -> list[str] | None:
    """Ids of the `samples` that the run of `weights`, or any fold, was trained on; None if there is no list."""
    known = _read(weights)
    return None if known is None else [sample.id for sample in samples if _short(sample) in known]


def _short(sample: Sample) -> str:
    return sample.pixels[:_DIGITS]


def _read(weights: str | Path) -> set[str] | None:
    """The digests of the run that `weights` belongs to, or of all folds; None if there is no list."""
    listed = [run for run in find_folds(weights) or [find_run(weights)] if run and is_present(run.training_images)]
    if not listed:
        return None
    texts = [read_regular(run.training_images).decode("ascii", errors="replace") for run in listed]
    lines = [line for text in texts for line in text.splitlines()]
    return {line.strip() for line in lines if line.strip() and not line.startswith("#")}
