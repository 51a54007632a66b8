"""The PyTorch original: finds the coordinates of a landmark and its size in a colour image."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Locator(nn.Module):
    """Images (N, 3, H, W) to three numbers each, (N, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1)
        self.up_norm = nn.GroupNorm(2, 6)
        self.mix = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6 * 4 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Halve and double the resolution, resize to 4x4, and take everything together."""
        x = F.relu(self.stem_norm(self.stem(x)))
        x = F.gelu(self.up_norm(self.up(x)))
        x = F.interpolate(x, (7, 7), mode="bilinear", align_corners=True)
        x = F.max_pool2d(F.relu(self.mix(x)), 3, stride=2, padding=1)
        return self.head(torch.flatten(x, 1))


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error."""
    return F.mse_loss(output, target)


def optimizer(parameters: object) -> torch.optim.Optimizer:
    """Adam with L2."""
    return torch.optim.Adam(parameters, lr=1e-3, weight_decay=1e-2)  # type: ignore[arg-type]
