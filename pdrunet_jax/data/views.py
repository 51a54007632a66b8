"""What a trained network makes of single images: how confident it is, and which features it sees."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pdrunet_jax import config
from pdrunet_jax.config import DataConfig
from pdrunet_jax.data.fit import Fit, Spacing
from pdrunet_jax.model.base import Network
from pdrunet_jax.model.confidence import confidences
from pdrunet_jax.model.execution import Execution
from pdrunet_jax.model.load import find_run, load_model
from pdrunet_jax.model.pixels import predict_classes, probabilities, unit_range
from pdrunet_jax.runtime import compile as compiling
from pdrunet_jax.runtime.errors import RunError


class View(NamedTuple):
    """What a network makes of one image."""

    confidence: float
    """The least of its classes' `confidences`, from 0 to 1."""
    empty: bool
    """Whether it finds no class in the image."""
    features: np.ndarray
    """(D,) float32: the mean over the image of every channel that its layers put out."""


class Viewer:
    """A trained network that looks at images. Raises `UserError` as `load_model` does."""

    def __init__(self, weights: str | Path) -> None:
        self._model = load_model(weights)
        run = find_run(weights)
        self.settings: DataConfig | None = None if run is None else config.read(run.config_file).data
        """Settings of the data that the run was trained on; None for weights without a run."""

    @property
    def channels(self) -> int:
        """Channels of its images."""
        return self._model.in_channels

    def look(self, pixels: np.ndarray, spacing: Spacing | None = None, *, name: str = "the image") -> View:
        """Run the network on an image (H, W, C) in [0, 255], called `name`, at the training size.

        Raises `UserError` if the image cannot be fitted to the network, `RunError` for logits that are not finite.
        """
        model, shape = self._model, (pixels.shape[0], pixels.shape[1])
        fit = Fit(model.size or shape, model.fit, model.spacing)
        graphdef, state = nnx.split(model)
        logits, features = _compiled()(graphdef, state, fit.image(pixels, spacing)[None])
        values = fit.box(shape, spacing).crop(np.asarray(logits)[0])[None]
        if not np.isfinite(values).all():
            raise RunError(f"{name}: the network computes NaN or infinity: the weights are not usable; use others")
        probability = np.asarray(probabilities(values, multilabel=model.multilabel))[0]
        mask = np.asarray(predict_classes(values, multilabel=model.multilabel))[0]
        found = confidences(probability[..., 0] if model.outputs == 1 else probability, mask)
        return View(min(found), not mask.any(), np.asarray(features)[0])


@cache
def _compiled() -> Any:
    """Compile the network with the means of what its layers put out, at the first call."""

    def run(
        graphdef: nnx.GraphDef[Network], state: nnx.State[Any, Any], images: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graphdef, state)
        means: list[jax.Array] = []

        def tap(name: str, values: jax.Array) -> None:
            means.append(values.astype(jnp.float32).mean(axis=(1, 2)))

        logits = model(unit_range(images), execution=replace(Execution.of(model.config.conv), tap=tap))
        return logits, jnp.concatenate(means, axis=-1)

    return compiling.jit(run, static_argnums=0)
