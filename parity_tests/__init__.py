"""Parity tests: JAX and PyTorch with the same weights and inputs, level by level (docs/parity.md)."""
