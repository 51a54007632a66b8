"""PyTorch twin of `pdrunet_jax`, the reference of the parity tests. Training does not need it."""

from pdrunet_torch_ref.model import PDRUNet

__all__ = ["PDRUNet"]
