"""PDR-UNet: Shen et al., Inverse Problems and Imaging, doi 10.3934/ipi.2020057.

Pure dilated residual U-Net: no down- or up-sampling, the same number of filters everywhere, dilations that double on
the way in and halve on the way out, and long skips that are additions.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from pdrunet_jax.model.fast.phases import Activation, to_phases
from pdrunet_jax.model.fast.xla import checkpoint_block, force_materialize, map_chunks
from pdrunet_jax.model.layers import (
    BatchNorm,
    Conv,
    Path,
    Tap,
    block_fused,
    choose_path,
    conv_norm_relu,
    dropout,
    from_image,
    keep_masks,
)
from pdrunet_jax.model.sharding import check_images, spread

BLOCKS = {
    "std_block": 1,
    "e1": 2,
    "e2": 4,
    "e3": 8,
    "e4": 16,
    "bottleneck_0": 32,
    "bottleneck_2": 32,
    "bottleneck_4": 32,
    "d1": 16,
    "d2": 8,
    "d3": 4,
    "d4": 2,
    "d5": 1,
}
"""The blocks in the order of the forward pass, each with its dilation; names as in the public PyTorch code."""


def public_name(block: str) -> str:
    """What the public PyTorch code calls one of `BLOCKS`: those of the bottleneck are in a container of their own."""
    return block.replace("_", ".") if block.startswith("bottleneck") else block


class Block(nnx.Module):
    """Two 3x3 convolutions with normalisation and ReLU (the paper's Figure 2).

    residual, shortcut "input": relu(bn2(conv2(relu(bn1(conv1(x))))) + x), as the public code has it;
    residual, shortcut "conv1": the same with c1 = relu(bn1(conv1(x))) added in place of x, as the figure is drawn;
    not residual (the first block): relu(bn2(conv2(relu(bn1(conv1(x)))))).
    """

    def __init__(
        self,
        name: str,
        inputs: int,
        filters: int,
        dilation: int,
        *,
        residual: bool,
        shortcut: str,
        norm: str,
        init: str,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.name = name
        self.dilation = dilation
        self.residual = residual
        self.shortcut = shortcut
        self.first = Conv(inputs, filters, init=init, dtype=dtype, rngs=rngs)
        self.bnorm1 = BatchNorm(filters, dtype=dtype) if norm == "batch" else None
        self.second = Conv(filters, filters, init=init, dtype=dtype, rngs=rngs)
        self.bnorm2 = BatchNorm(filters, dtype=dtype) if norm == "batch" else None

    def rematerialised(self, x: Activation, *, path: Path, train: bool) -> Activation:
        """The block's output; for the gradient only `x` is kept, and the rest is computed again from it."""
        parts: Any = nnx.split(self, nnx.Param, nnx.BatchStat)
        graphdef, params, stats = parts

        def compute(params: Any, stats: Any, x: Activation) -> tuple[Activation, Any]:
            block = nnx.merge(graphdef, params, stats, copy=True)
            return block(x, path=path, train=train, tap=None), nnx.state(block, nnx.BatchStat)

        out, stats = checkpoint_block(compute)(params, stats, x)
        nnx.update(self, stats)
        return out

    def map_chunks(self, x: Activation, *, path: Path) -> Activation:
        """The block's output in evaluation, phases and images taken in parts that stay in the caches."""
        x = x.for_dilation(self.dilation)

        def part(values: jax.Array) -> jax.Array:
            return self(x.with_values(values), path=path, train=False, tap=None).values

        return x.with_values(map_chunks(part, x.values))

    def __call__(self, x: Activation, *, path: Path, train: bool, tap: Tap | None) -> Activation:
        """The block's output; arguments as in `conv_norm_relu`."""
        if path == "fused" and train and self.bnorm1 is not None and self.bnorm2 is not None:
            out = block_fused(
                x,
                self.first,
                self.bnorm1,
                self.second,
                self.bnorm2,
                shortcut="none" if not self.residual else "conv1" if self.shortcut == "conv1" else "input",
                dilation=self.dilation,
            )
            if tap is not None:
                tap(self.name, out.image())
            return out
        layer = partial(conv_norm_relu, dilation=self.dilation, path=path, train=train, tap=tap)
        c1 = layer(x, self.first, self.bnorm1, None, names=(f"{self.name}.first", f"{self.name}.bnorm1"))
        skip = (x if self.shortcut == "input" else c1) if self.residual else None
        out = layer(c1, self.second, self.bnorm2, skip, names=(f"{self.name}.second", f"{self.name}.bnorm2"))
        if tap is not None:
            tap(self.name, out.image())
        return out


class PDRUNet(nnx.Module):
    """The network of the paper's Figure 1.

    Args:
        in_channels: image channels.
        outputs: 1 for a sigmoid, 2 or more for a softmax over exclusive classes, background included.
        filters: channels of every hidden convolution.
        shortcut: where a block's residual starts, "input" or "conv1" (see `Block`).
        norm: "batch", or "none".
        dropout: rate of the two dropouts in the bottleneck.
        conv: execution path of the 3x3 convolutions, "auto" or one of `pdrunet_jax.layers.PATHS`.
        remat: for a gradient, keep only what enters each block and compute the rest a second time (rematerialisation).
        init: "torch" for PyTorch's default distributions, "he" for He normal.
        dtype: arithmetic of the convolutions; that of the parameters when None.
        param_dtype: parameters, statistics and logits.
        mesh: from `pdrunet_jax.mesh.make_mesh`, to spread images, and their rows, over its devices.
        rngs: its `params` stream draws the initial weights.

    Attributes:
        size: (height, width) that it was trained at, where that is known; it takes any other, too.

    Raises:
        ValueError: an option that does not exist.
    """

    def __init__(
        self,
        *,
        in_channels: int = 1,
        outputs: int = 1,
        filters: int = 40,
        shortcut: str = "input",
        norm: str = "batch",
        dropout: float = 0.3,
        conv: str = "auto",
        remat: bool = False,
        init: str = "torch",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        mesh: Mesh | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        if shortcut not in ("input", "conv1"):
            raise ValueError(f"shortcut = {shortcut!r}; it is input or conv1")
        if norm not in ("batch", "none"):
            raise ValueError(f"norm = {norm!r}; it is batch or none")
        self.in_channels = in_channels
        self.outputs = outputs
        self.filters = filters
        self.shortcut = shortcut
        self.norm = norm
        self.dropout = dropout
        self.path = choose_path(conv)
        self.remat = remat
        self.mesh = mesh
        self.size: tuple[int, int] | None = None
        self.dtype = jnp.dtype(param_dtype if dtype is None else dtype)
        for name, dilation in BLOCKS.items():
            first = name == "std_block"
            block = Block(
                public_name(name),
                in_channels if first else filters,
                filters,
                dilation,
                residual=not first,
                shortcut=shortcut,
                norm=norm,
                init=init,
                dtype=param_dtype,
                rngs=rngs,
            )
            setattr(self, name, block)
        self.final_conv = Conv(filters, outputs, size=1, init=init, dtype=param_dtype, rngs=rngs)

    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool = False,
        dropout_key: jax.Array | None = None,
        dropout_masks: Sequence[jax.Array] | None = None,
        tap: Tap | None = None,
    ) -> jax.Array:
        """Logits of `images`.

        Args:
            images: (N, H, W, in_channels), in [0, 1]. Any size; multiples of 32 are fastest.
            train: use the batch's statistics, update the running ones, and drop out.
            dropout_key: a key for the dropouts' random masks, needed in training unless the rate is 0.
            dropout_masks: two boolean (N, H, W, filters) arrays of what to keep, in place of a key.
            tap: is called with the public name and the value of each block's output, and on the plain and polyphase
                paths also of each convolution and normalisation. Not on a mesh.

        Returns:
            (N, H, W, outputs), in the parameters' dtype.

        Raises:
            ValueError: the shape does not fit, training with dropout but without key or masks, or a tap on a mesh.
            UserError: the images cannot be spread over the mesh.
        """
        if images.ndim != 4 or images.shape[-1] != self.in_channels:
            raise ValueError(f"images have the shape {images.shape}; it should be (N, H, W, {self.in_channels})")
        if not train or self.dropout == 0:
            keep: Sequence[jax.Array] | None = None
        elif dropout_masks is not None:
            keep = dropout_masks
        elif dropout_key is not None:
            keep = keep_masks(dropout_key, self.dropout, (*images.shape[:3], self.filters))
        else:
            raise ValueError("training with dropout needs dropout_key or dropout_masks")
        if self.mesh is None:
            return self._logits(images, keep, train=train, tap=tap)
        if tap is not None:
            raise ValueError("a network on a mesh has no single device that a tap could see everything on")
        check_images(self.mesh, *images.shape[:2])
        parts: Any = nnx.split(self, nnx.Param, nnx.BatchStat)
        graphdef, params, stats = parts

        def part(state: Any, pixels: Any) -> tuple[jax.Array, Any]:
            network = nnx.merge(graphdef, *state, copy=True)
            return network._logits(*pixels, train=train, tap=None), nnx.state(network, nnx.BatchStat)

        logits, stats = spread(self.mesh, part)((params, stats), (images, keep))
        nnx.update(self, stats)
        return logits

    def _logits(
        self, images: jax.Array, keep: Sequence[jax.Array] | None, *, train: bool, tap: Tap | None
    ) -> jax.Array:
        def block(name: str, x: Activation) -> Activation:
            layers: Block = getattr(self, name)
            if self.remat and train and tap is None:
                if self.mesh is None and name != "std_block":
                    # Otherwise XLA keeps two activations a block: this one, and what it computes it from again.
                    x = x.for_dilation(layers.dilation)
                    x = x.with_values(force_materialize(x.values))
                return layers.rematerialised(x, path=self.path, train=train)
            if self.path == "fused" and not train and tap is None:
                return layers.map_chunks(x, path=self.path)
            return layers(x, path=self.path, train=train, tap=tap)

        def drop(x: Activation, number: int) -> Activation:
            if keep is None:
                return x
            return x.with_values(dropout(x.values, self.dropout, to_phases(keep[number], 1, x.layout)))

        x = from_image(images.astype(self.dtype), self.path)
        x0 = block("std_block", x)
        x1 = block("e1", x0)
        x2 = block("e2", x1 + x0)
        x3 = block("e3", x2)
        x4 = block("e4", x3 + x2)
        b1 = drop(block("bottleneck_0", x4), 0)
        b2 = drop(block("bottleneck_2", b1), 1)
        z = block("bottleneck_4", b2)
        u1 = block("d1", x4 + z) + z
        u2 = block("d2", x3 + u1)
        u3 = block("d3", x2 + u2) + u2
        u4 = block("d4", x1 + u3)
        u5 = block("d5", x0 + u4)

        # A 1x1 convolution is a matrix product; the logits are computed in the parameters' dtype.
        kernel, bias = self.final_conv.kernel[...], self.final_conv.bias[...]
        logits = u5.image().astype(kernel.dtype) @ kernel[0, 0] + bias.reshape(1, 1, 1, -1)
        if tap is not None:
            tap("final_conv", logits)
        return logits
