"""Freeze layers by name: no gradient, no update, no weight decay, and running statistics that stay as they are.

Names are the public ones, as in the weights file: `e1` and `bottleneck.0` are blocks, `e1.first` a convolution,
`e1.bnorm1` a normalisation, `e1.first.weight` an array. A pattern that matches a block or layer stands for all of it.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import accumulate

from flax import nnx

from pdrunet_jax.config import ModelConfig
from pdrunet_jax.model.base import Network
from pdrunet_jax.model.layers import BatchNorm, State
from pdrunet_jax.model.weights import parameter_table, public_key
from pdrunet_jax.runtime.errors import DataError, UserError


def is_frozen(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of `patterns` matches the public `name` of an array, or a layer or block that it is part of."""
    inside = accumulate(name.split("."), lambda outer, part: f"{outer}.{part}")
    return any(fnmatchcase(each, pattern) for each in inside for pattern in patterns)


def describe_frozen(config: ModelConfig, outputs: int, patterns: Sequence[str]) -> str:
    """One line on what is frozen and how much is trained.

    Raises:
        DataError: a pattern that matches nothing; the message lists the blocks and layers that exist.
        UserError: nothing is left to train.
    """
    rows = parameter_table(config, outputs)
    layers = dict.fromkeys(row.public.rpartition(".")[0] for row in rows)
    if wrong := [each for each in patterns if not any(is_frozen(row.public, [each]) for row in rows)]:
        blocks = dict.fromkeys(layer.rpartition(".")[0] or layer for layer in layers)
        first = next(iter(blocks))
        parts = [layer for layer in layers if layer.startswith(f"{first}.")]
        known = f"the blocks are {', '.join(blocks)}, and the layers of {first} are {', '.join(parts)}"
        raise DataError(f"train.freeze: {known}", [f"{each!r} matches none of them" for each in wrong])
    trained = [row for row in rows if not is_frozen(row.public, patterns)]
    if not trained:
        raise UserError(f"train.freeze = {', '.join(patterns)} leaves nothing to train")
    sizes = {row.public: row.size for row in rows}
    count, every = sum(sizes[row.public] for row in trained), sum(sizes.values())
    return f"frozen: {', '.join(patterns)}; {count:,} of {every:,} parameters are trained"


def split_params(params: State, patterns: Sequence[str]) -> tuple[State, State]:
    """Split parameters into those that are trained and those that are frozen."""
    if not patterns:
        return params, nnx.State({})
    parts = nnx.split_state(params, lambda path, _: not is_frozen(public_key(path), patterns), ...)
    return parts[0], parts[1]


def join_params(trained: State, frozen: State) -> State:
    """The inverse of `split_params`."""
    return nnx.merge_state(trained, frozen) if frozen else trained


def freeze_norms(model: Network, patterns: Sequence[str]) -> None:
    """Make the normalisations whose parameters are all frozen use their running statistics in training."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, BatchNorm):
            names = (public_key((*map(str, path), leaf)) for leaf in ("scale", "bias"))
            module.frozen = all(is_frozen(name, patterns) for name in names)
