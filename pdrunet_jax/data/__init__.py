"""Datasets: folders, images, mask coding, patients and splits, batches, augmentation, importers, phantoms."""

from pdrunet_jax.data.dataset import Dataset, Inspection, ensure_phantoms, inspect_dataset, open_dataset
from pdrunet_jax.data.images import read_image, read_spacing, resize_image
from pdrunet_jax.data.masks import IGNORE, MaskCoding, read_mask, resize_mask
from pdrunet_jax.data.split import Sample

__all__ = [
    "IGNORE",
    "Dataset",
    "Inspection",
    "MaskCoding",
    "Sample",
    "ensure_phantoms",
    "inspect_dataset",
    "open_dataset",
    "read_image",
    "read_mask",
    "read_spacing",
    "resize_image",
    "resize_mask",
]
