"""Errors, files, checkpoints, devices and processes."""
