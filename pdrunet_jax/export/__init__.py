"""`python -m pdrunet_jax.export`: ONNX and StableHLO."""
