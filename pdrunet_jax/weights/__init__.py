"""Weights that come with the package, their cards, and the commands `pdrunet weights` and `publish`."""
