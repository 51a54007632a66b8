"""Convert weights and training runs between PyTorch and JAX; the command `python -m pdrunet_jax.convert`."""
