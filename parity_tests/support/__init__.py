"""Shared parts of the parity tests: cases, both sides of a comparison, the error budget."""
