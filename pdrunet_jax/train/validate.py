"""Validation: score the current weights on the validation images, at the network's resolution."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pdrunet_jax.data.masks import PADDING
from pdrunet_jax.data.overlay import sample_sheet
from pdrunet_jax.evaluate import metrics
from pdrunet_jax.model.layers import State
from pdrunet_jax.runtime.devices import Placement
from pdrunet_jax.runtime.stop import StopFlag
from pdrunet_jax.train.step import Batch, Metrics
from pdrunet_jax.train.wandb_run import Picture

Case = tuple[np.ndarray, np.ndarray, np.ndarray, str]
"""Image (H, W, C), true mask with `PADDING`, predicted mask, all uint8, and a caption.

Masks are (H, W), or (H, W, K) if classes overlap.
"""


@dataclass(frozen=True)
class Validation:
    """Mean loss, Dice and IoU over images (Dice and IoU are also means over classes), and some cases to look at."""

    loss: float
    dice: float
    iou: float
    cases: tuple[Case, ...]

    def metrics(self) -> dict[str, float]:
        """The scores under their names in metrics.jsonl."""
        return {"val/loss": self.loss, "val/dice": self.dice, "val/iou": self.iou}

    def sheet(self) -> Image.Image:
        """Draw the cases without their padding: image, truth, prediction and errors of each."""
        cropped = []
        for *pixels, _ in self.cases:
            inside = pixels[1].reshape(*pixels[1].shape[:2], -1)[..., 0] != PADDING
            part = np.ix_(inside.any(axis=1), inside.any(axis=0))
            cropped.append([each[part] for each in pixels])
        images, truths, predictions = zip(*cropped, strict=True)
        return sample_sheet(images, truths, predictions, [caption for *_, caption in self.cases])

    def pictures(self) -> list[Picture]:
        """The cases as W&B shows them: all of one size, so padding stays, as background."""
        pictures = []
        for image, truth, prediction, caption in self.cases:
            masks = (np.where(truth == PADDING, 0, mask).astype(np.uint8) for mask in (prediction, truth))
            pictures.append(Picture(caption, image, *masks))
        return pictures


def validate(
    eval_step: Callable[[State, State, Batch], Metrics],
    params: State,
    stats: State,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    names: tuple[str, ...],
    cases: int,
    soft: bool,
    place: Placement,
    stop: StopFlag | None = None,
) -> Validation | None:
    """Score the weights `params` and `stats` on all `batches` of `eval_batches`, without their padding.

    Each process gives its own shard of the batches; the result covers all. The images have these `names`, in order, and
    `cases` of them, spread evenly, are kept. `soft` masks hold grey values instead of class indices. Returns None if
    asked to stop, which is checked before each batch: a validation may take longer than the time before a kill.
    """
    losses, scores, overlaps, kept = [], [], [], []
    chosen = set(np.linspace(0, len(names) - 1, min(cases, len(names))).round().astype(int).tolist())
    for batch in batches:
        if stop is not None and stop.ask():
            return None
        placed = place.shard_batch(batch)
        result = place.to_host(eval_step(params, stats, {"image": placed["image"], "mask": placed["mask"]}))
        index, valid = place.to_host((placed["index"], placed["valid"]))
        counts = metrics.Counts(**{field: result[field] for field in metrics.Counts._fields})
        losses.append(result["loss"][valid])
        scores.append(np.asarray(metrics.dice(counts))[valid])
        overlaps.append(np.asarray(metrics.iou(counts))[valid])
        shown = [row for row in np.flatnonzero(valid) if int(index[row]) in chosen]
        images, masks = place.to_host((placed["image"], placed["mask"])) if shown else ((), ())
        for row in shown:
            truth = (masks[row] > 127).astype(np.uint8) if soft else masks[row]
            caption = f"dice {scores[-1][np.count_nonzero(valid[:row])].mean():.3f}  {names[int(index[row])]}"
            kept.append((images[row], truth, result["prediction"][row], caption))
    return Validation(
        loss=float(np.concatenate(losses).mean()),
        dice=float(np.concatenate(scores).mean()),
        iou=float(np.concatenate(overlaps).mean()),
        cases=tuple(kept),
    )
