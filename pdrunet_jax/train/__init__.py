"""`python -m pdrunet_jax.train`: the training loop, its step, losses, optimizer and tracking."""
