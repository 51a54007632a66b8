"""The PyTorch twin of `pdrunet_jax`: what the JAX model is compared with, name by name. Training never needs it."""

from pdrunet_torch_ref.model import PDRUNet

__all__ = ["PDRUNet"]
