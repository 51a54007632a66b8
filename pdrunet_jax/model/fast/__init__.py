"""Faster ways to compute the same numbers. Imported by `pdrunet_jax.model` alone."""
