"""Engines: what computes the logits of a network. JAX, or a runtime that takes the network as an ONNX graph."""
