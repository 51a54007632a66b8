"""How and where a pass is computed. Nothing here changes what the network computes; parity level 10 holds that."""

import dataclasses
from typing import Self

import jax
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from pdrunet_jax.model.fast import native, native_library
from pdrunet_jax.model.fast.block import Shortcut
from pdrunet_jax.model.fast.pallas import require_nvidia
from pdrunet_jax.model.fast.phases import ROWS, Activation, finest_phases
from pdrunet_jax.model.fast.xla import checkpoint_block, force_materialize, map_chunks, on_cpu
from pdrunet_jax.model.layers import (
    OTHER_PATHS,
    PATHS,
    BatchNorm,
    Conv,
    Path,
    State,
    Tap,
    fused_training_block,
    split_state,
)
from pdrunet_jax.runtime.errors import UserError


class BlockBase(nnx.Module):
    """A part of a network that maps an activation to one of the same resolution."""

    name: str
    dilation: int = 1
    shortcut: Shortcut = "none"

    @property
    def pair(self) -> tuple[tuple[Conv, BatchNorm], tuple[Conv, BatchNorm]] | None:
        """Its two layers, if it is a block of Figure 2 with normalisation."""
        return None

    def __call__(self, x: Activation, *, train: bool, execution: "Execution") -> Activation:
        """Apply the block layer by layer; arguments as in `conv_norm_relu`."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Execution:
    """How and where a pass is computed."""

    path: Path = "plain"
    """Implementation of the 3x3 convolutions."""
    remat: bool = False
    """In training, keep only the input of each block and compute the rest again for the gradient."""
    mesh: Mesh | None = None
    """Devices to split the batch over, from `pdrunet_jax.runtime.devices.make_mesh`; None for one device."""
    tap: Tap | None = None
    """Called with the public name and the value of each block's output and, on the plain and polyphase paths, of each
    convolution and normalisation. Not on a mesh."""

    @classmethod
    def of(cls, conv: str, *, remat: bool = False, mesh: Mesh | None = None) -> Self:
        """The execution for a setting of `model.conv`; "auto" is the native path where it runs, else the fused path.

        Raises:
            ValueError: there is no such path.
            UserError: the path does not run on this computer's devices.
        """
        if conv == "auto":
            conv = "native" if mesh is None and on_cpu() and native_library.problem() is None else "fused"
        if conv in OTHER_PATHS and mesh is not None:
            raise UserError(f"model.conv = {conv} runs on one device only; use model.conv = auto")
        if conv == "pallas":
            require_nvidia()
        if conv == "native":
            native.require_kernels()
        for path in (*PATHS, *OTHER_PATHS):
            if path == conv:
                return cls(path, remat, mesh)
        raise ValueError(f"conv = {conv!r}; it is one of auto, {', '.join((*PATHS, *OTHER_PATHS))}")

    def for_dtypes(self, compute: DTypeLike, parameters: DTypeLike) -> Self:
        """This execution, with the fused path in the place of the native one where its kernels lack the dtypes."""
        if self.path == "native" and not (compute == parameters and native.has_kernels(compute)):
            return dataclasses.replace(self, path="fused")
        return self

    @property
    def folds(self) -> bool:
        """Whether evaluation folds the normalisation into the kernels, and training takes a block at once."""
        return self.path in ("fused", "native", "pallas")

    def first_activation(self, images: jax.Array) -> Activation:
        """`images` (N, H, W, C) as the first activation, free to take the layout that path and size allow."""
        if self.path == "native":
            return Activation.of(images, ROWS)
        height, width = images.shape[1:3]
        return Activation.of(images, 1 if self.path in ("plain", "pallas") else finest_phases(height, width))


def note_on(conv: str) -> str | None:
    """A sentence for users whose computer has a CPU without the kernels that `model.conv` = auto would take."""
    if conv != "auto" or not on_cpu() or (reason := native_library.problem()) is None:
        return None
    return f"convolutions run on XLA's kernels, two to three times slower than this package's own: {reason}"


def custom_calls(dtype: str = "float32") -> tuple[str, ...]:
    """Names of the custom calls that programs in `dtype` may contain; they are registered where they can be."""
    return native_library.calls(dtype) if on_cpu() and native_library.problem(dtype) is None else ()


def run_block(block: BlockBase, x: Activation, *, train: bool, execution: Execution) -> Activation:
    """Apply a block as `execution` says."""
    if execution.tap is None and train and execution.remat:
        return _rematerialised(block, x, execution)
    if execution.tap is None and not train and execution.path == "fused":
        # A few phases or images at a time, which stay in the caches between the layers.
        x = x.for_dilation(block.dilation)
        return x.with_values(
            map_chunks(lambda values: _run(block, x.with_values(values), False, execution).values, x.values)
        )
    return _run(block, x, train, execution)


def _run(block: BlockBase, x: Activation, train: bool, execution: Execution) -> Activation:
    if execution.path == "native" and _is_small(block, x):
        # For few pixels of many channels XLA's convolutions are faster than the compiled kernels.
        ordinary = dataclasses.replace(x.in_phases(1), limit=1)
        out = _run(block, ordinary, train, dataclasses.replace(execution, path="fused"))
        return dataclasses.replace(out, limit=x.limit)
    if train and execution.folds and (pair := block.pair):
        out = fused_training_block(x, *pair, shortcut=block.shortcut, dilation=block.dilation, execution=execution)
    else:
        out = block(x, train=train, execution=execution)
    if execution.tap is not None:
        execution.tap(block.name, out.image())
    return out


def _is_small(block: BlockBase, x: Activation) -> bool:
    """Whether a block without dilation has fewer pixels than products of an input and an output channel."""
    channels = x.values.shape[x.channel_axis]
    return block.dilation == 1 and x.values.size < channels**3


def _rematerialised(block: BlockBase, x: Activation, execution: Execution) -> Activation:
    """Train through a block that keeps nothing but its input for the gradient."""
    if execution.mesh is None and block.shortcut != "none":
        # Otherwise XLA keeps two activations a block: this one, and the one that it is computed from again.
        x = x.for_dilation(block.dilation)
        x = x.with_values(force_materialize(x.values))
    graphdef, params, stats = split_state(block)

    def compute(params: State, stats: State, x: Activation) -> tuple[Activation, State]:
        inner = nnx.merge(graphdef, params, stats, copy=True)
        return _run(inner, x, True, execution), nnx.state(inner, nnx.BatchStat)

    out, stats = checkpoint_block(compute)(params, stats, x)
    nnx.update(block, stats)
    return out
