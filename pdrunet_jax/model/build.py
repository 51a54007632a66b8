"""Networks by name."""

from typing import Any

from pdrunet_jax.config import Config, ModelConfig, from_dict, to_dict
from pdrunet_jax.model.base import Network
from pdrunet_jax.model.fusionnet import FusionNet
from pdrunet_jax.model.network import PDRUNet
from pdrunet_jax.model.unet import UNet
from pdrunet_jax.runtime.errors import UserError

NETWORKS: dict[str, type[Network]] = {"pdrunet": PDRUNet, "unet": UNet, "fusionnet": FusionNet}
"""Class of each `model.name`."""

TITLES = {"pdrunet": "PDR-UNet", "unet": "U-Net", "fusionnet": "FusionNet"}
"""Name of each `model.name` in messages."""


def build(config: ModelConfig, **options: Any) -> Network:
    """Build the network `config.name`; arguments and errors as for `Network`."""
    return NETWORKS[config.name](config, **options)


def read_network(text: str) -> dict[str, str]:
    """Options of a network written as words: its name, and further options of `ModelConfig` as OPTION=VALUE.

    "unet filters=32" and "name=unet filters=32" are the same. Raises `UserError` unless one network is named and every
    option is given once.
    """
    options: dict[str, str] = {}
    for word in text.split():
        option, separator, value = word.partition("=")
        option, value = (option, value) if separator else ("name", word)
        if option in options:
            raise UserError(f"the network {text!r} has two values for {option}; give one")
        options[option] = value
    if options.get("name") not in NETWORKS:
        raise UserError(
            f"the network {text!r} does not begin with one of the names {', '.join(NETWORKS)}; options may follow, as "
            'in "unet filters=32 depth=4"'
        )
    return options


def with_network(config: Config, text: str) -> Config:
    """The settings `config` with the network that `text` names (`read_network`).

    Options that `text` leaves out stay as they are in `config`, as far as the network has them. Raises `UserError` for
    options that the network lacks, and values out of bounds.
    """
    options = read_network(text)
    model = {**config.model.of(options["name"]), **options}
    return from_dict({**to_dict(config, none=True), "model": model}, f"the network {text!r}")
