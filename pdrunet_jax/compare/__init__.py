"""Comparison of networks: the same images, seeds and settings for all, their scores and differences."""
