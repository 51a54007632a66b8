"""Segment images with a trained model; the command `python -m pdrunet_jax.predict`."""
