"""Scores of the present weights on the validation images, at the network's resolution."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pdrunet_jax.data.overlay import sample_sheet
from pdrunet_jax.evaluate import metrics
from pdrunet_jax.runtime.devices import Placement
from pdrunet_jax.runtime.stop import StopFlag

Case = tuple[np.ndarray, np.ndarray, np.ndarray, str]
"""Image (H, W, C) and masks (H, W) of truth and prediction, all uint8, and a caption."""


@dataclass(frozen=True)
class Validation:
    """Means over images of each image's loss, Dice and IoU (these two over its classes), and some cases to look at."""

    loss: float
    dice: float
    iou: float
    cases: tuple[Case, ...]

    def metrics(self) -> dict[str, float]:
        """As lines of metrics.jsonl have them."""
        return {"val/loss": self.loss, "val/dice": self.dice, "val/iou": self.iou}

    def sheet(self) -> Any:
        """The cases as one picture (`PIL.Image.Image`): image, truth, prediction and difference of each."""
        images, truths, predictions, captions = zip(*self.cases, strict=True)
        return sample_sheet(images, truths, predictions, captions)


def validate(
    eval_step: Callable[[Any, Any, Any], Any],
    params: Any,
    stats: Any,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    names: tuple[str, ...],
    cases: int,
    soft: bool,
    place: Placement | None = None,
    stop: StopFlag | None = None,
) -> Validation | None:
    """Run `eval_step` over `batches` (of `eval_batches`); padding counts nowhere. None if it was `stop`ped.

    Args:
        eval_step: from `make_eval_step`.
        params: the weights that are scored.
        stats: the running statistics.
        batches: images and masks, in the order of `names`.
        names: of the images, for captions.
        cases: how many images to keep for `sheet`, spread evenly over all.
        place: on the mesh of `eval_step`, where it has one. The batches are this process's share, the result is of all.
        soft: masks are grey values in place of class indices.
        stop: becomes true when the program is asked to stop; a validation may take longer than it is then given.
    """
    place = place or Placement()
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
