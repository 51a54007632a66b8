"""Export a trained model to ONNX or StableHLO; the command `python -m pdrunet_jax.export`."""
