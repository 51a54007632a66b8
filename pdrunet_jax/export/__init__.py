"""Export a trained model to ONNX, StableHLO, a page or the Hub; the command `python -m pdrunet_jax.export`."""
