"""PyTorch twin of `pdrunet_jax`, the reference of the parity tests. Training does not need it."""

from pdrunet_torch_ref.model import PDRUNet
from pdrunet_torch_ref.pyramid import FusionNet, UNet

__all__ = ["TWINS", "FusionNet", "PDRUNet", "UNet"]

TWINS = {"pdrunet": PDRUNet, "unet": UNet, "fusionnet": FusionNet}
"""Twin of each network by its `model.name`."""
