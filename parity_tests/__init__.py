"""JAX against PyTorch: the same weights and inputs on both sides, level by level (docs/parity.md)."""
