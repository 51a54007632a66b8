"""Networks by name."""

from typing import Any

from pdrunet_jax.config import ModelConfig
from pdrunet_jax.model.base import Network
from pdrunet_jax.model.fusionnet import FusionNet
from pdrunet_jax.model.network import PDRUNet
from pdrunet_jax.model.unet import UNet

NETWORKS: dict[str, type[Network]] = {"pdrunet": PDRUNet, "unet": UNet, "fusionnet": FusionNet}
"""Class of each `model.name`."""

TITLES = {"pdrunet": "PDR-UNet", "unet": "U-Net", "fusionnet": "FusionNet"}
"""Name of each `model.name` in messages."""


def build(config: ModelConfig, **options: Any) -> Network:
    """Build the network `config.name`; arguments and errors as for `Network`."""
    return NETWORKS[config.name](config, **options)
