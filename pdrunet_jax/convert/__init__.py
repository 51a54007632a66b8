"""`python -m pdrunet_jax.convert`: weights and trainings between PyTorch and JAX."""
