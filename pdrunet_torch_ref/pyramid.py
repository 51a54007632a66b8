"""U-Net and FusionNet in PyTorch, from torch.nn's own layers, with the options of `pdrunet_jax.model`."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pdrunet_torch_ref.model import Dropout, Norm, StandardBlock, make_norm

Down = Literal["max", "stride"]
Up = Literal["transposed", "bilinear", "bilinear_corners"]


class Resized(nn.Module):
    """Double the resolution: transposed convolution, or bilinear interpolation and a 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int, up: Up, kernel: int, norm: Norm | None) -> None:
        super().__init__()
        self.up = up
        if up == "transposed":
            extra = kernel - 2
            self.conv: nn.Module = nn.ConvTranspose2d(
                inputs, outputs, kernel, stride=2, padding=extra, output_padding=extra
            )
        else:
            self.conv = nn.Conv2d(inputs, outputs, 1)
        self.activated = norm is not None
        self.bnorm = nn.Identity() if norm is None else make_norm(outputs, norm)

    def forward(self, x: Tensor, like: Tensor) -> Tensor:
        """Map `x` to the resolution of `like`; what is missing at the bottom and on the right is zero."""
        height, width = like.shape[2:]
        if self.up == "transposed":
            x = self.conv(x)
        else:
            corners = self.up == "bilinear_corners"
            x = self.conv(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=corners))
        x = self.bnorm(x)
        x = (torch.relu(x) if self.activated else x)[:, :, :height, :width]
        return F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]))


class Level(nn.Module):
    """FusionNet's block: a convolution, a residual block of three, and a convolution."""

    is_block = True

    def __init__(self, inputs: int, outputs: int, norm: Norm) -> None:
        super().__init__()
        for number in range(1, 6):
            channels = inputs if number == 1 else outputs
            self.add_module(f"conv{number}", nn.Conv2d(channels, outputs, kernel_size=3, padding=1))
            self.add_module(f"bnorm{number}", make_norm(outputs, norm))

    def forward(self, x: Tensor) -> Tensor:
        """The activation after the last convolution."""
        first = inner = self._layer(1, x)
        for number in (2, 3, 4):
            inner = self._layer(number, inner)
        return self._layer(5, first + inner)

    def _layer(self, number: int, x: Tensor) -> Tensor:
        conv, norm = self.get_submodule(f"conv{number}"), self.get_submodule(f"bnorm{number}")
        return torch.relu(norm(conv(x)))


class _Pyramid(nn.Module):
    """The way down and the way up, which the two networks share."""

    def __init__(self, filters: int, outputs: int, depth: int, down: Down) -> None:
        super().__init__()
        self.depth = depth
        self.widths = [filters * 2**level for level in range(depth + 1)]
        self.outputs = outputs
        self.down = down

    def build(self, in_channels: int, up: Up, norm: Norm, *, kernel: int, up_norm: Norm | None, joined: bool) -> None:
        inputs = in_channels
        for level, width in enumerate(self.widths[:-1]):
            self.add_module(f"encoder_{level}", self.block(inputs, width, norm))
            if self.down == "stride":
                self.add_module(f"down_{level}", nn.Conv2d(width, width, kernel_size=3, stride=2, padding=1))
            inputs = width
        self.bottom = self.block(inputs, self.widths[-1], norm)
        for level in reversed(range(self.depth)):
            width = self.widths[level]
            self.add_module(f"up_{level}", Resized(self.widths[level + 1], width, up, kernel, up_norm))
            self.add_module(f"decoder_{level}", self.block(2 * width if joined else width, width, norm))
        self.final_conv = nn.Conv2d(self.widths[0], self.outputs, kernel_size=1)

    def block(self, inputs: int, outputs: int, norm: Norm) -> nn.Module:
        raise NotImplementedError

    def merge(self, skip: Tensor, x: Tensor) -> Tensor:
        raise NotImplementedError

    def after(self, level: int, x: Tensor) -> Tensor:
        """What follows the block of a level on the way down."""
        return x

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, outputs, H, W) of `images`."""
        x, skips = images, []
        for level in range(self.depth):
            x = self.after(level, self.get_submodule(f"encoder_{level}")(x))
            skips.append(x)
            x = F.max_pool2d(x, 2) if self.down == "max" else self.get_submodule(f"down_{level}")(x)
        x = self.after(self.depth, self.bottom(x))
        for level in reversed(range(self.depth)):
            x = self.get_submodule(f"up_{level}")(x, skips[level])
            x = self.get_submodule(f"decoder_{level}")(self.merge(skips[level], x))
        logits: Tensor = self.final_conv(x)
        return logits


class UNet(_Pyramid):
    """U-Net with zero padding and batch normalisation: images (N, in_channels, H, W) -> logits (N, outputs, H, W)."""

    def __init__(
        self,
        in_channels: int = 1,
        outputs: int = 1,
        filters: int = 64,
        norm: Norm = "batch",
        dropout: float = 0.3,
        depth: int = 4,
        down: Down = "max",
        up: Up = "transposed",
    ) -> None:
        super().__init__(filters, outputs, depth, down)
        self.build(in_channels, up, norm, kernel=2, up_norm=None, joined=True)
        self.dropouts = nn.ModuleList([Dropout(dropout), Dropout(dropout)])

    def block(self, inputs: int, outputs: int, norm: Norm) -> nn.Module:
        """Two 3x3 convolutions."""
        return StandardBlock(inputs, outputs, 1, norm)

    def merge(self, skip: Tensor, x: Tensor) -> Tensor:
        """Concatenate."""
        return torch.cat([skip, x], 1)

    def after(self, level: int, x: Tensor) -> Tensor:
        """Dropout after the last two levels."""
        number = level - (self.depth - 1)
        return x if number < 0 else self.dropouts[number](x)


class FusionNet(_Pyramid):
    """FusionNet with zero padding and batch normalisation: images (N, C, H, W) -> logits (N, outputs, H, W)."""

    def __init__(
        self,
        in_channels: int = 1,
        outputs: int = 1,
        filters: int = 64,
        norm: Norm = "batch",
        depth: int = 4,
        down: Down = "max",
        up: Up = "transposed",
    ) -> None:
        super().__init__(filters, outputs, depth, down)
        self.build(in_channels, up, norm, kernel=3, up_norm=norm, joined=False)

    def block(self, inputs: int, outputs: int, norm: Norm) -> nn.Module:
        """Five 3x3 convolutions."""
        return Level(inputs, outputs, norm)

    def merge(self, skip: Tensor, x: Tensor) -> Tensor:
        """Add."""
        return skip + x
