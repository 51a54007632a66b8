"""PDR-UNet in PyTorch, with the public code's names and the options of `pdrunet_jax.model`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

Norm = Literal["batch", "none"]
Shortcut = Literal["input", "conv1"]
Tap = Callable[[str, Tensor], None]

LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)

ENCODER_DILATIONS = {"e1": 2, "e2": 4, "e3": 8, "e4": 16, "e5": 32}
BOTTLENECK_DILATION = 32
DECODER_DILATIONS = {"d1": 16, "d2": 8, "d3": 4, "d4": 2, "d5": 1}


class StandardBlock(nn.Module):
    """Two dilated 3x3 convolutions, each with normalisation and ReLU; (N, C, H, W) -> (N, filters, H, W)."""

    is_block = True

    def __init__(self, in_channels: int, filters: int, dilation: int, norm: Norm = "batch") -> None:
        super().__init__()
        self.first = _conv3x3(in_channels, filters, dilation)
        self.bnorm1 = make_norm(filters, norm)
        self.second = _conv3x3(filters, filters, dilation)
        self.bnorm2 = make_norm(filters, norm)

    def forward(self, x: Tensor) -> Tensor:
        """relu(bn2(conv2(relu(bn1(conv1(x))))))."""
        inner = torch.relu(self.bnorm1(self.first(x)))
        return torch.relu(self.bnorm2(self.second(inner)))


class ResidualBlock(StandardBlock):
    """`StandardBlock` with a shortcut, from the block's input or its first convolution, added before the last ReLU."""

    def __init__(self, filters: int, dilation: int, norm: Norm = "batch", shortcut: Shortcut = "input") -> None:
        super().__init__(filters, filters, dilation, norm)
        self.shortcut_from: Shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """relu(bn2(conv2(c1)) + shortcut) with c1 = relu(bn1(conv1(x)))."""
        inner = torch.relu(self.bnorm1(self.first(x)))
        shortcut = x if self.shortcut_from == "input" else inner
        return torch.relu(self.bnorm2(self.second(inner)) + shortcut)


class Dropout(nn.Module):
    """Dropout with an optional keep mask, because the random streams of two frameworks cannot agree."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.keep: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """In training, zero dropped values and scale the others by 1 / (1 - rate)."""
        if self.keep is None or not self.training:
            return nn.functional.dropout(x, self.rate, self.training)
        return torch.where(self.keep, x / (1 - self.rate), torch.zeros_like(x))


class PDRUNet(nn.Module):
    """The network of the paper's Figure 1: images (N, in_channels, H, W) -> logits (N, outputs, H, W).

    `dead_block` includes the public code's block `e5`, which is never called. With it and the default options, the
    state dict has the public layout of 392,561 parameters.
    """

    e1: ResidualBlock
    e2: ResidualBlock
    e3: ResidualBlock
    e4: ResidualBlock
    d1: ResidualBlock
    d2: ResidualBlock
    d3: ResidualBlock
    d4: ResidualBlock
    d5: ResidualBlock

    def __init__(
        self,
        in_channels: int = 1,
        outputs: int = 1,
        filters: int = 40,
        shortcut: Shortcut = "input",
        norm: Norm = "batch",
        dropout: float = 0.3,
        dead_block: bool = True,
    ) -> None:
        super().__init__()

        def residual(dilation: int) -> ResidualBlock:
            return ResidualBlock(filters, dilation, norm, shortcut)

        self.std_block = StandardBlock(in_channels, filters, 1, norm)
        for name, dilation in ENCODER_DILATIONS.items():
            if dead_block or name != "e5":
                self.add_module(name, residual(dilation))
        self.bottleneck = nn.Sequential(
            residual(BOTTLENECK_DILATION),
            Dropout(dropout),
            residual(BOTTLENECK_DILATION),
            Dropout(dropout),
            residual(BOTTLENECK_DILATION),
        )
        for name, dilation in DECODER_DILATIONS.items():
            self.add_module(name, residual(dilation))
        self.final_conv = nn.Conv2d(filters, outputs, kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of `images`; any height and width."""
        x0 = self.std_block(images)
        x1 = self.e1(x0)
        x2 = self.e2(x1 + x0)
        x3 = self.e3(x2)
        x4 = self.e4(x3 + x2)
        z = self.bottleneck(x4)
        u1 = self.d1(z + x4) + z
        u2 = self.d2(u1 + x3)
        u3 = self.d3(u2 + x2) + u2
        u4 = self.d4(u3 + x1)
        u5 = self.d5(u4 + x0)
        logits: Tensor = self.final_conv(u5)
        return logits


@contextmanager
def dropout_masks(model: nn.Module, masks: Sequence[Tensor] | None) -> Iterator[None]:
    """Context in which dropout in training keeps the values where `masks`, boolean (N, filters, H, W), are true.

    None leaves dropout to PyTorch's generator.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, Dropout)]
    given: Sequence[Tensor | None] = [None] * len(layers) if masks is None else masks
    if len(given) != len(layers):
        raise ValueError(f"{len(layers)} dropout masks are needed, not {len(given)}")
    try:
        for layer, keep in zip(layers, given, strict=True):
            layer.keep = keep
        yield
    finally:
        for layer in layers:
            layer.keep = None


@contextmanager
def tapped(model: nn.Module, tap: Tap) -> Iterator[None]:
    """Context in which forward passes call `tap(name, output)` for every named block, convolution and normalisation.

    Names are as in the state dict: `e1.first`, `e1.bnorm1`, `e1`, ..., `bottleneck.0`, `final_conv`. Dropout
    and the identity used for `norm="none"` are not reported.
    """

    def hook(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _module, _inputs, output: tap(name, output)

    handles = [
        module.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if name and (isinstance(module, LAYERS) or getattr(module, "is_block", False))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _conv3x3(in_channels: int, filters: int, dilation: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, filters, kernel_size=3, padding=dilation, dilation=dilation)


def make_norm(filters: int, norm: Norm) -> nn.Module:
    """Batch normalisation, or nothing; raises `ValueError` for another name."""
    if norm not in ("batch", "none"):
        raise ValueError(f"norm is 'batch' or 'none', not {norm!r}")
    return nn.BatchNorm2d(filters) if norm == "batch" else nn.Identity()
