"""Measurements of speed and memory; nothing of the package depends on them."""
