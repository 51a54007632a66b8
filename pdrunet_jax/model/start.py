"""Start a training from trained weights: every layer, and in the last one the classes that both networks have."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pdrunet_jax.config import WIRING
from pdrunet_jax.model.base import Network
from pdrunet_jax.model.load import Loaded, load_weights, report
from pdrunet_jax.model.pixels import class_names
from pdrunet_jax.runtime.errors import DataError

BACKGROUND = "the background"
_KERNEL, _BIAS = ("final_conv", "kernel"), ("final_conv", "bias")

Columns = dict[object, np.ndarray]
"""Weights and bias (inputs + 1,) of each output channel, by the name of its class."""


def load_same(weights: str | Path, network: Mapping[str, Any]) -> Loaded:
    """Load weights for a network whose `WIRING` is given, except that it may have other outputs.

    Raises as `load_model`, and `DataError` that names each option that differs.
    """
    loaded = load_weights(weights)
    names = WIRING if network["name"] == loaded.options["name"] else ("name",)
    problems = [
        f"--model.{name.replace('_', '-')} is {network[name]}, there it is {loaded.options[name]}"
        for name in names
        if name != "outputs" and network[name] != loaded.options.get(name, network[name])
    ]
    if problems:
        raise DataError(f"--train.weights {weights} is another network", problems)
    return loaded


def start_from(model: Network, weights: str | Path, classes: Sequence[str]) -> list[str]:
    """Replace the arrays of `model` by those of `weights`, in the model's dtype. Raises as `load_same`.

    In the last layer, an output is copied from that of the same class, whatever its place. If there is none, it keeps
    its initial weights. A class without a name of its own is taken for the only one of the other weights. A softmax and
    a sigmoid are converted into each other: the logit of a sigmoid is that of its class relative to the background's.

    Args:
        model: of the same options as `weights`, except for the outputs.
        weights: as for `load_model`; averaged ones if the run keeps an average. A threshold does not go along.
        classes: names of the foreground classes of `model`.

    Returns:
        Sentences on the last layer, unless it is copied as it is.
    """
    loaded = load_same(weights, vars(model.config))
    report(loaded)
    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    given, notes = dict(nnx.to_flat_state(nnx.merge_state(loaded.params, loaded.stats))), []
    names, own = list(loaded.options.get("class_names") or ()), list(classes)
    alike = (loaded.options["outputs"], loaded.multilabel) == (model.outputs, model.multilabel)
    if len(names) == len(own) == 1 and names != own and class_names(1, None)[0] in names + own:
        notes = [f"the class {names[0]} of {weights} is taken for {own[0]}"]
        names, loaded = own, loaded._replace(options={**loaded.options, "class_names": own})
    if not names and alike:
        notes = [f"{weights} does not name its classes; taken for {', '.join(own)}, in this order"]
    elif not alike or names != own:
        kernel, bias, what = _last_layer(model, loaded, own)
        stated = f"has the classes {', '.join(names)}" if names else "does not name its classes"
        notes.append(f"{weights} {stated}; the last layer is {what}")
        given |= {_KERNEL: nnx.Param(kernel), _BIAS: nnx.Param(bias)}
    arrays = nnx.from_flat_state(given)
    nnx.update(model, jax.tree.map(lambda old, new: jnp.asarray(new, old.dtype), state, arrays))
    return notes


def _last_layer(model: Network, loaded: Loaded, classes: list[str]) -> tuple[np.ndarray, np.ndarray, str]:
    """Kernel (1, 1, inputs, outputs) and bias (outputs,) with the classes of `loaded` copied, and which those are."""
    last, flat = model.final_conv, dict(nnx.to_flat_state(loaded.params))
    names = list(loaded.options.get("class_names") or ())
    ours = _columns(last.kernel[...], last.bias[...], classes, sigmoid=model.multilabel)
    theirs = _columns(flat[_KERNEL][...], flat[_BIAS][...], names, sigmoid=loaded.multilabel)
    if BACKGROUND in theirs and BACKGROUND not in ours:
        background = theirs.pop(BACKGROUND)
        theirs = {name: column - background for name, column in theirs.items()}
    elif BACKGROUND in ours and BACKGROUND not in theirs and theirs.keys() & ours.keys():
        theirs[BACKGROUND] = np.zeros_like(ours[BACKGROUND])
    copied = [str(name) for name in ours if name in theirs]
    new = [str(name) for name in ours if name not in theirs]
    table = np.stack([theirs.get(name, column) for name, column in ours.items()], axis=1)
    parts = [f"copied for {', '.join(copied)}"] if copied else []
    parts += [f"new, with random weights, for {', '.join(new)}"] if new else []
    return table[None, None, :-1], table[-1], " and ".join(parts)


def _columns(kernel: Any, bias: Any, classes: Sequence[str], *, sigmoid: bool) -> Columns:
    """Columns of a last layer: the background's first, unless each class has a sigmoid; unnamed ones by their place."""
    table = np.concatenate([np.asarray(kernel)[0, 0], np.asarray(bias)[None]])
    first = [] if sigmoid or bias.size == 1 else [BACKGROUND]
    count = bias.size - len(first)
    names: Sequence[object] = classes if len(classes) == count else range(count)
    return dict(zip([*first, *names], table.T, strict=True))
