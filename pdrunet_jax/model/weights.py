"""Convert weights between PyTorch and the Flax model, by one table of names.

The names of PDR-UNet are the public PyTorch code's, and those of the other networks the twin's. Attributes of the Flax
model have the same names, with three exceptions: `bottleneck.0` is `bottleneck_0`, the `weight` (O, I, H, W) of a
convolution, or (I, O, H, W) of a transposed one, is a `kernel` (H, W, I, O), and the `weight` of a normalisation is a
`scale`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from pdrunet_jax.config import ModelConfig
from pdrunet_jax.model.base import Part
from pdrunet_jax.model.build import NETWORKS, TITLES
from pdrunet_jax.model.network import PDRUNet, public_name
from pdrunet_jax.model.state_dict import find_state_dict, misfit, public_counts, shortened
from pdrunet_jax.runtime.errors import DataError

DEAD_BLOCK = "e5"
"""Block that the public code builds and never calls: part of its state dict, but not of our model."""

HWIO = (2, 3, 1, 0)
OIHW = (3, 2, 0, 1)
"""Axes that take a kernel from PyTorch's layout to Flax's, and back."""
IOHW = (2, 3, 0, 1)
"""The same for a transposed convolution, in both directions."""


@dataclass(frozen=True)
class Entry:
    """One row of the table: a key of the public state dict, and the path of the same array in the Flax model."""

    public: str
    path: tuple[str, ...]
    shape: tuple[int, ...]
    """In the public layout."""
    variable: type[nnx.Variable[Any]]
    """`nnx.Param`, or `nnx.BatchStat` for running statistics."""
    transposed: bool = False
    """Whether it is the kernel of a transposed convolution, (I, O, H, W)."""

    def to_flax(self, value: np.ndarray) -> np.ndarray:
        """Change from the public layout to the Flax model's."""
        return np.transpose(value, IOHW if self.transposed else HWIO) if value.ndim == 4 else value

    def to_public(self, value: np.ndarray) -> np.ndarray:
        """Change from the Flax model's layout to the public one."""
        return np.transpose(value, IOHW if self.transposed else OIHW) if value.ndim == 4 else value

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def parameter(self) -> bool:
        """Whether it is trained; everything else is a running statistic."""
        return self.variable is nnx.Param

    @property
    def count(self) -> bool:
        """Whether it is the integer `num_batches_tracked`; everything else is floating point."""
        return self.path[-1] == "num_batches_tracked"


class Imported(NamedTuple):
    """A public state dict in the form of the Flax model, as NumPy arrays in the file's dtype."""

    options: dict[str, Any]
    """Options that shapes and names show: name, in_channels, outputs, filters, norm, and depth, down and up."""
    params: nnx.State[Any, Any]
    stats: nnx.State[Any, Any]
    notes: tuple[str, ...]
    """Sentences on anything unwrapped, dropped or widened."""


def name_table(
    in_channels: int,
    outputs: int,
    filters: int,
    norm: str,
    name: str = "pdrunet",
    depth: int = 4,
    down: str = "max",
    up: str = "transposed",
) -> tuple[Entry, ...]:
    """List every array of the model, in the order of the public state dict (without `e5`); options of `ModelConfig`."""
    options: Any = {"in_channels": in_channels, "filters": filters, "depth": depth, "down": down, "up": up}
    network, rows = NETWORKS[name], []
    for part in network.parts(ModelConfig(**options)):
        public = public_name(part.name)
        if part.kind == "block":
            rows += _block(public, part, network.block_layers, norm)
        elif part.kind == "down":
            rows += _conv(public, (part.name,), (part.outputs, part.inputs, part.size, part.size))
        else:
            transposed = up == "transposed"
            channels = (part.inputs, part.outputs) if transposed else (part.outputs, part.inputs)
            rows += _conv(f"{public}.conv", (part.name, "conv"), (*channels, part.size, part.size), transposed)
            if part.normalised and norm == "batch":
                rows += _norm(f"{public}.bnorm", (part.name, "bnorm"), part.outputs)
    return (*rows, *_conv("final_conv", ("final_conv",), (outputs, filters, 1, 1)))


def parameter_table(config: ModelConfig, outputs: int) -> list[Entry]:
    """List the parameters of a network with `outputs` output channels, as in `name_table`."""
    rows = name_table(
        config.in_channels, outputs, config.filters, config.norm, config.name, config.depth, config.down, config.up
    )
    return [row for row in rows if row.parameter]


def dead_entries(filters: int, norm: str) -> tuple[Entry, ...]:
    """List the arrays of `e5`, which the Flax model does not have."""
    return tuple(_block(DEAD_BLOCK, Part("block", DEAD_BLOCK, filters, filters), PDRUNet.block_layers, norm))


def from_public(arrays: Mapping[str, Any], source: str) -> Imported:
    """Convert arrays under the public names to the state of the Flax model.

    `find_state_dict` finds them in dictionaries and behind prefixes of training scripts, with a note.

    Args:
        arrays: arrays by public name, anything that `np.asarray` takes; or dictionaries that contain them.
        source: name of the file, for messages.

    Raises:
        DataError: says what the arrays are instead, and lists missing, unused and misshapen keys, wrong dtypes, and
            arrays with NaN or infinity, or with a negative variance.
        UserError: they are of several networks.
    """
    arrays, notes = find_state_dict(arrays, source)
    values = {key: np.asarray(value) for key, value in arrays.items()}
    half = [key for key, value in values.items() if value.dtype.name in ("float16", "bfloat16")]
    values |= {key: values[key].astype(np.float32) for key in half}

    options = _options(values)
    title, rows = TITLES[options["name"]], name_table(**options)
    dead = dead_entries(options["filters"], options["norm"]) if options["name"] == "pdrunet" else ()
    known = {row.public for row in (*rows, *dead)}
    optional = {row.public for row in (*rows, *dead) if row.count or row in dead}
    cause = misfit(known - optional, values.keys() - optional)
    counts, changes = public_counts(values, [row.public for row in rows if row.count])
    values, notes = {**values, **counts}, notes + changes
    problems = [f"{row.public} {problem}" for row in rows if (problem := _problem(row, values.get(row.public)))]
    diverged = [row.public for row in rows if _nonfinite(values.get(row.public))]
    problems += [f"{key} holds NaN or infinity: its training diverged" for key in diverged]
    variances = [row.public for row in rows if row.path[-1] == "running_var" and row.public in values]
    problems += [f"{key} holds negative variances" for key in variances if (values[key] < 0).any()]
    problems += [f"{key} is unused: {title} has no such array" for key in values if key not in known]
    dtypes = {values[row.public].dtype.name for row in rows if row.public in values and not row.count}
    if not problems and len(dtypes) > 1:
        problems.append(f"the arrays mix {' and '.join(sorted(dtypes))}; one of them is needed")
    if problems:
        what = f"{source} does not hold the weights of a {title}"
        raise DataError(f"{what}: {cause}" if cause else what, shortened(problems))

    if dropped := [row for row in dead if row.public in values]:
        count = sum(values[row.public].size for row in dropped if row.parameter)
        notes.append(f"dropped {DEAD_BLOCK}.*: {count:,} parameters of a block that the network never calls")
    if half:
        notes.append(f"widened {len(half)} arrays of half precision to float32")
    states: dict[bool, Any] = {True: {}, False: {}}
    for row in rows:
        value = row.to_flax(values[row.public])
        states[row.parameter][row.path] = row.variable(np.array(value, np.int32 if row.count else None, order="C"))
    params, stats = (nnx.from_flat_state(states[parameter]) for parameter in (True, False))
    return Imported(options, params, stats, tuple(notes))


def to_public(params: Mapping[Any, Any], stats: Mapping[Any, Any], *, dead_block: bool = True) -> dict[str, np.ndarray]:
    """Convert state of the Flax model to arrays under the public names, in the public order, layout and dtype.

    Args:
        params: the `nnx.Param` part of the model's state, or nested dictionaries of its arrays.
        stats: the `nnx.BatchStat` part; empty without normalisation.
        dead_block: fill `e5` with zeros, so that the public code's strict loader accepts the result.

    Raises:
        DataError: lists every missing, unused and misshapen array by its path in the model.
    """
    flat = (leaf for state in (params, stats) for leaf in nnx.to_flat_state(nnx.State(state)))
    leaves = {tuple(map(str, path)): np.asarray(value[...]) for path, value in flat}
    options = _options({public_key(path): _shape_in_public(array) for path, array in leaves.items()})
    title, rows = TITLES[options["name"]], name_table(**options)
    by_path = {row.path: row for row in rows}
    values = {path: by_path[path].to_public(array) if path in by_path else array for path, array in leaves.items()}
    problems = [f"{'.'.join(row.path)} {problem}" for row in rows if (problem := _problem(row, values.get(row.path)))]
    problems += [f"{'.'.join(path)} is unused: {title} has no such array" for path in values if path not in by_path]
    if problems:
        raise DataError(f"the state cannot be written as the weights of a {title}", problems)

    dtype = values["final_conv", "kernel"].dtype
    result: dict[str, np.ndarray] = {}
    for row in rows:
        if dead_block and row.path == ("bottleneck_0", "first", "kernel"):
            for zero in dead_entries(options["filters"], options["norm"]):
                result[zero.public] = np.zeros(zero.shape, np.int64 if zero.count else dtype)
        value = values[row.path]
        result[row.public] = np.array(value, np.int64 if row.count else value.dtype, order="C")
    return result


def public_key(path: tuple[str, ...]) -> str:
    """The public name of the array at `path` in the Flax model."""
    return ".".join(
        (public_name(path[0]), *path[1:-1], {"kernel": "weight", "scale": "weight"}.get(path[-1], path[-1]))
    )


def _shape_in_public(array: np.ndarray) -> np.ndarray:
    """`array` in the public layout of an ordinary convolution; enough to derive options from."""
    return np.transpose(array, OIHW) if array.ndim == 4 else array


def _conv(public: str, path: tuple[str, ...], shape: tuple[int, ...], transposed: bool = False) -> list[Entry]:
    return [
        Entry(f"{public}.weight", (*path, "kernel"), shape, nnx.Param, transposed),
        Entry(f"{public}.bias", (*path, "bias"), (shape[1 if transposed else 0],), nnx.Param),
    ]


def _norm(public: str, path: tuple[str, ...], channels: int) -> list[Entry]:
    return [
        Entry(f"{public}.weight", (*path, "scale"), (channels,), nnx.Param),
        Entry(f"{public}.bias", (*path, "bias"), (channels,), nnx.Param),
        Entry(f"{public}.running_mean", (*path, "running_mean"), (channels,), nnx.BatchStat),
        Entry(f"{public}.running_var", (*path, "running_var"), (channels,), nnx.BatchStat),
        Entry(f"{public}.num_batches_tracked", (*path, "num_batches_tracked"), (), nnx.BatchStat),
    ]


def _block(public: str, part: Part, layers: Sequence[tuple[str, str]], norm: str) -> list[Entry]:
    rows = []
    for number, (conv, bnorm) in enumerate(layers):
        shape = (part.outputs, part.outputs if number else part.inputs, part.size, part.size)
        rows += _conv(f"{public}.{conv}", (part.name, conv), shape)
        if norm == "batch":
            rows += _norm(f"{public}.{bnorm}", (part.name, bnorm), part.outputs)
    return rows


def _options(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Derive the model's options from its arrays in the public layout, with defaults where they do not fit.

    Of the ways to double the resolution, "bilinear" stands for "bilinear_corners" too.
    """
    encoders = {key.split(".")[0] for key in arrays if key.startswith("encoder_")}
    fusion = any(key.startswith("encoder_") and ".conv1." in key for key in arrays)
    name = ("fusionnet" if fusion else "unet") if encoders else "pdrunet"
    layer = {"pdrunet": "std_block.first", "unet": "encoder_0.first", "fusionnet": "encoder_0.conv1"}[name]
    first, last = arrays.get(f"{layer}.weight"), arrays.get("final_conv.weight")
    options: dict[str, Any] = {"name": name, "in_channels": 1, "outputs": 1, "filters": 40}
    if last is not None and last.ndim == 4:
        options |= {"outputs": last.shape[0], "filters": last.shape[1]}
    if first is not None and first.ndim == 4:
        options |= {"in_channels": first.shape[1], "filters": first.shape[0]}
    options["norm"] = "batch" if any(".bnorm" in key for key in arrays) else "none"
    if name == "pdrunet":
        return options
    up = arrays.get("up_0.conv.weight")
    bilinear = up is not None and up.ndim == 4 and up.shape[-1] == 1
    return options | {
        "depth": len(encoders),
        "down": "stride" if "down_0.weight" in arrays else "max",
        "up": "bilinear" if bilinear else "transposed",
    }


def _problem(row: Entry, array: np.ndarray | None) -> str | None:
    """Describe what is wrong with `array`, in the public layout, for `row`; None if nothing is."""
    if array is None:
        return f"is missing; its shape should be {row.shape}"
    if array.shape != row.shape:
        return f"has the shape {array.shape}; it should be {row.shape}"
    if row.count:
        return None if array.dtype.kind in "iu" else f"is {array.dtype}; it should be an integer"
    return None if array.dtype in (np.float32, np.float64) else f"is {array.dtype}; it should be float32 or float64"


def _nonfinite(array: np.ndarray | None) -> bool:
    return array is not None and array.dtype.kind == "f" and not np.isfinite(array).all()
