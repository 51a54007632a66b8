"""best.safetensors: the weights of a run that scored best on its validation images, with what is needed to use them."""

from pdrunet_jax.config import Config
from pdrunet_jax.data.dataset import Dataset
from pdrunet_jax.integrity import CONTENT, content_digest
from pdrunet_jax.progress import Progress
from pdrunet_jax.runfolder import RunFolder
from pdrunet_jax.step import TrainState
from pdrunet_jax.weights import to_public, write_safetensors


def save_best(
    run: RunFolder, config: Config, dataset: Dataset, outputs: int, state: TrainState, progress: Progress
) -> None:
    """Write it, under the public names, as the weights of `progress.best_step`. Raises `RunError`."""
    arrays = to_public(state.ema or state.params, state.stats)
    options = {
        "in_channels": config.model.in_channels,
        "outputs": outputs,
        "filters": config.model.filters,
        "shortcut": config.model.shortcut,
        "norm": config.model.norm,
        "dropout": config.model.dropout,
        "size": list(config.data.height_width),
        "class_names": list(dataset.class_names),
        "step": progress.best_step,
        "val_dice": progress.best_dice,
    }
    write_safetensors(run.best, arrays, {**options, CONTENT: content_digest(arrays, options)})
