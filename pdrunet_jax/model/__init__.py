"""The network: layers, wiring, weights and their files."""
