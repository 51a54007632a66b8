"""A Flax module, its PyTorch original, the table of their names, and an input: all that a parity test needs.

`port` makes the pair of any network; `our_pair` that of this project's. `harness` compares the two level by level.
"""

import dataclasses
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from typing import Any

import jax
import numpy as np
import optax
import torch
from flax import nnx

from parity_tests.support import jax_side, jax_training, torch_side
from parity_tests.support.case import (
    Arrays,
    Batch,
    Case,
    Compared,
    make_images,
    make_masks,
    make_objective,
)
from parity_tests.support.jax_side import FlaxHalf, OurFlax
from parity_tests.support.torch_side import TorchHalf, on_torch
from pdrunet_jax.model.layers import Tap
from pdrunet_jax.model.weights import Entry


@dataclasses.dataclass(frozen=True)
class Layout:
    """How an array of PyTorch is laid out in Flax: its axes in another order, then some of them mirrored."""

    axes: tuple[int, ...] = ()
    mirrored: tuple[int, ...] = ()

    def to_flax(self, value: np.ndarray) -> np.ndarray:
        return np.flip(np.transpose(value, self.axes) if self.axes else value, self.mirrored)

    def to_public(self, value: np.ndarray) -> np.ndarray:
        value = np.flip(value, self.mirrored)
        return np.transpose(value, np.argsort(self.axes)) if self.axes else value


SAME = Layout()
CONVOLUTION = Layout((2, 3, 1, 0))
"""(O, I, H, W) to (H, W, I, O)."""
TRANSPOSED_CONVOLUTION = Layout((2, 3, 0, 1), mirrored=(0, 1))
"""(I, O, H, W) to (H, W, I, O), mirrored: `nnx.ConvTranspose` does not flip the kernel, PyTorch does."""
LINEAR = Layout((1, 0))
"""(O, I) to (I, O)."""

Names = Mapping[str, tuple[str, Layout]]
"""PyTorch's name of each array: its path in the Flax module, with dots, and its layout."""


def names_of(original: torch.nn.Module, renamed: Mapping[str, str] | None = None) -> dict[str, tuple[str, Layout]]:
    """Propose the table of names for Flax's own layers with the module names of `original`.

    Covers convolutions, linear layers and normalisations; anything else keeps its name and layout. `renamed` gives the
    path of a module that has another name in Flax.
    """
    result = {}
    for name, module in original.named_modules():
        path = (renamed or {}).get(name, name)
        leaves = {"weight": "kernel", "running_mean": "mean", "running_var": "var"}
        layout = SAME
        if isinstance(module, torch.nn.ConvTranspose2d):
            layout = TRANSPOSED_CONVOLUTION
        elif isinstance(module, torch.nn.Conv2d):
            layout = CONVOLUTION
        elif isinstance(module, torch.nn.Linear):
            layout = LINEAR
        elif isinstance(module, torch_side.NORMS):
            leaves["weight"] = "scale"
        else:
            leaves = {}
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for leaf, _ in own:
            if leaf != "num_batches_tracked":
                kept = layout if leaf == "weight" else SAME
                result[f"{name}.{leaf}".lstrip(".")] = (f"{path}.{leaves.get(leaf, leaf)}".lstrip("."), kept)
    return result


@dataclasses.dataclass(frozen=True)
class Row(Entry):
    """A row of the table of any network."""

    layout: Layout = SAME

    def to_flax(self, value: np.ndarray) -> np.ndarray:
        return self.layout.to_flax(value)

    def to_public(self, value: np.ndarray) -> np.ndarray:
        return self.layout.to_public(value)


@dataclasses.dataclass(frozen=True, eq=False)
class PortedFlax:
    """The Flax half of any network."""

    make: Callable[[], nnx.Module]
    names: Names
    shapes: Mapping[str, tuple[int, ...]]
    """Shapes of PyTorch's arrays, by name."""
    dtype: str

    def blank(self) -> Arrays:
        """Zeros by public name."""
        return {name: np.zeros(self.shapes[name], self.dtype) for name in self.names}

    @cached_property
    def rows(self) -> list[Row]:
        """The table, in PyTorch's order; raises AssertionError that lists whatever does not fit."""
        leaves = dict(nnx.to_flat_state(nnx.state(nnx.eval_shape(self.make), (nnx.Param, nnx.BatchStat))))
        paths = {".".join(map(str, path)): path for path in leaves}
        used = [path for path, _ in self.names.values()]
        problems = [f"{name} of PyTorch is not in the table" for name in self.shapes if name not in self.names]
        problems += [f"{name} of the table is not in PyTorch" for name in self.names if name not in self.shapes]
        problems += [f"{path} of Flax is not in the table" for path in paths if path not in used]
        problems += [f"{path} is in the table twice" for path in dict.fromkeys(used) if used.count(path) > 1]
        rows = []
        for name in self.shapes:
            path, layout = self.names.get(name, ("", SAME))
            if path and path not in paths:
                problems.append(f"{path} of the table, for {name}, is not in Flax")
            if path not in paths:
                continue
            leaf = leaves[paths[path]]
            try:
                shape = layout.to_flax(np.empty(self.shapes[name])).shape
            except ValueError:
                problems.append(f"{name} has the shape {self.shapes[name]}, which its layout does not fit")
                continue
            if shape != leaf.shape:
                problems.append(f"{path} has the shape {leaf.shape}; {name} gives it {shape}")
            rows.append(Row(name, paths[path], self.shapes[name], type(leaf), layout=layout))
        assert not problems, "level 1, names and shapes:\n  " + "\n  ".join(problems)
        return rows

    def build(self, arrays: Arrays) -> nnx.Module:
        """See `FlaxHalf`."""
        model = self.make()
        values = {row.path: row.variable(jax.numpy.asarray(row.to_flax(arrays[row.public]))) for row in self.rows}
        nnx.update(model, nnx.from_flat_state(values))
        return model

    def call(self, model: Any, images: jax.Array, *, train: bool, masks: Any, tap: Tap) -> jax.Array:
        """See `FlaxHalf`."""
        assert masks is None, "build both networks without dropout: their random streams cannot agree"
        model.train() if train else model.eval()
        names = {row.path[:-1]: row.public.rpartition(".")[0] for row in self.rows}
        with _tapped(model, names, tap), jax.numpy_rank_promotion("allow"):
            return model(images)

    def named(self, params: Any, stats: Any) -> Arrays:
        """See `FlaxHalf`."""
        flat = (leaf for state in (params, stats) for leaf in nnx.to_flat_state(state))
        leaves = {path: np.asarray(value[...]) for path, value in flat}
        return {
            row.public: np.array(row.to_public(leaves[row.path]), order="C") for row in self.rows if row.path in leaves
        }


@contextmanager
def _tapped(model: nnx.Module, names: Mapping[tuple[Any, ...], str], tap: Tap) -> Iterator[None]:
    """Context in which calls of the modules at these paths tell `tap` their name and output."""
    modules: dict[int, str] = {}
    kinds: set[type] = set()
    for path, name in names.items():
        part: Any = model
        for key in path:
            part = part[key] if isinstance(key, int) else getattr(part, key)
        if path:
            modules[id(part)] = name
            kinds.add(type(part))

    def observed(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            output = original(self, *args, **kwargs)
            if id(self) in modules:
                tap(modules[id(self)], output)
            return output

        return call

    own = {kind: vars(kind).get("__call__") for kind in kinds}
    wrapped = {kind: observed(kind.__call__) for kind in kinds}
    try:
        for kind, call in wrapped.items():
            kind.__call__ = call
        yield
    finally:
        for kind, call in own.items():
            if call is None:
                del kind.__call__
            else:
                kind.__call__ = call


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """Both halves of a network, and what the comparisons need. Made by `port` or `our_pair`."""

    name: str
    flax: FlaxHalf
    torch: TorchHalf
    batch: Callable[[int], Batch]
    """Input by number, 0 and up; always the same."""
    flax_loss: Callable[[jax.Array, Any], jax.Array]
    """loss(output, target) of a batch."""
    trainer: Any = None
    """`case.Trainer` with `start(arrays)`."""
    optimizer: optax.GradientTransformation | None = None
    kind: Compared | None = None
    """Answers for `partial` and `silent`; by default, every activation is there, and no bias is silent."""
    silenced: Collection[str] = ()
    given: Arrays | None = None
    """Arrays of the original by public name; random ones by default."""
    ours: bool = False
    """Whether it is a network of this project, with tolerances of its own."""

    @property
    def dtype(self) -> str:
        return self.torch.dtype

    @property
    def partial(self) -> bool:
        return self.kind is not None and self.kind.partial

    def silent(self, name: str, names: Container[str]) -> bool:
        return name in self.silenced if self.kind is None else self.kind.silent(name, names)

    @cached_property
    def arrays(self) -> Arrays:
        """Arrays of both halves, by public name."""
        arrays = on_torch(torch_side.initial_arrays, self.torch) if self.given is None else self.given
        return {name: array for name, array in arrays.items() if not self.torch.lacking(name)}

    def __str__(self) -> str:
        return self.name


def port(
    name: str,
    *,
    flax: Callable[[], nnx.Module],
    torch: Callable[[], torch.nn.Module],
    inputs: Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]],
    flax_loss: Callable[[jax.Array, Any], jax.Array],
    torch_loss: Callable[[Any, Any], Any],
    names: Names | None = None,
    optimizer: optax.GradientTransformation | None = None,
    torch_optimizer: Callable[[Any], Any] | None = None,
    dtype: str = "float64",
    silenced: Collection[str] = (),
    left_out: Sequence[str] = (),
) -> Pair:
    """Make the pair of any network; `harness.prove` compares its halves.

    Functions and classes of the PyTorch half must be importable, as PyTorch runs in a process of its own beside a GPU.

    Args:
        name: for messages.
        flax: builds the Flax module, in any dtype and without dropout. It is called with images (N, H, W, C).
        torch: builds the original, without dropout. It is called with images (N, C, H, W).
        inputs: draws a batch: images (N, H, W, C) and what the loss compares the output with.
        flax_loss, torch_loss: loss(output, target), a scalar.
        names: the table of names; by default `names_of` the original.
        optimizer: of the Flax side; without it, levels 7 to 9 are left out.
        torch_optimizer: makes the original's optimizer from its parameters.
        dtype: float64, where a difference cannot hide, or float32.
        silenced: biases that a normalisation removes; their gradients are rounding noise and compared as such.
        left_out: names in the original's state dict that the Flax module lacks by design, or their beginnings, which
            end in a dot. Always left out: `num_batches_tracked`, unless it is in the table.

    Raises:
        ValueError: an optimizer for one side only.
    """
    if (optimizer is None) != (torch_optimizer is None):
        raise ValueError("give both optimizer and torch_optimizer, or neither")
    original = torch()
    names = names_of(original) if names is None else names
    counts = [key for key in original.state_dict() if key.endswith("num_batches_tracked") and key not in names]
    kept = {row.rpartition(".")[0] for row in names if "." in row}
    observed = tuple(module for module, _ in original.named_modules() if module in kept)
    theirs = TorchHalf(
        torch,
        torch_loss,
        dtype,
        None if torch_optimizer is None else _OfParameters(torch_optimizer),
        observed,
        (*left_out, *counts),
    )
    shapes = {key: tuple(v.shape) for key, v in original.state_dict().items() if not theirs.lacking(key)}
    ours = PortedFlax(flax, names, shapes, dtype)

    @cache
    def batch(number: int) -> Batch:
        images, target = inputs(np.random.default_rng(number))
        target = target.astype(dtype) if target.dtype.kind == "f" else target.astype(np.int32)
        return Batch(images.astype(dtype), target)

    trainer = None if optimizer is None else jax_training.PortTrainer(ours, batch, flax_loss, optimizer)
    return Pair(name, ours, theirs, batch, flax_loss, trainer, optimizer, silenced=silenced)


@dataclasses.dataclass(frozen=True)
class _OfParameters:
    """An optimizer made from the parameters of a module."""

    make: Callable[[Any], torch.optim.Optimizer]

    def __call__(self, module: torch.nn.Module) -> torch.optim.Optimizer:
        return self.make(module.parameters())


@cache
def our_pair(case: Case) -> Pair:
    """The pair of a network of this project."""

    def batch(number: int) -> Batch:
        images, masks = (9 + number, 29 + number) if number else (1, 2)
        return Batch(make_images(case, images), make_objective(case), make_masks(case, masks))

    return Pair(
        str(case),
        OurFlax(case),
        torch_side.our_torch(case),
        batch,
        lambda logits, objective: jax_side.loss_of(objective)(logits),
        kind=case,
        ours=True,
    )
