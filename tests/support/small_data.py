"""Small datasets, written with Pillow."""

from pathlib import Path

import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from pdrunet_jax.config import DataConfig

SIZE = (20, 24)
"""Height and width of the images that `folder` writes."""


def shapes(seed: int = 0) -> np.ndarray:
    """(H, W) uint8 class indices 0, 1 and 2: two rectangles whose place depends on `seed`."""
    classes = np.zeros(SIZE, np.uint8)
    row = 2 + seed % 5
    classes[row : row + 8, 3:10] = 1
    classes[row : row + 6, 13:20] = 2
    return classes


def noise(seed: int) -> np.ndarray:
    """(H, W) uint8 that no other seed gives."""
    return np.random.default_rng(seed).integers(0, 256, SIZE, dtype=np.uint8)


def save(pixels: np.ndarray | Image.Image, path: Path, **options: object) -> Path:
    """Write an image, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def config(root: Path, **settings: object) -> DataConfig:
    """Settings for a small dataset; decodes in one thread unless told otherwise."""
    return DataConfig(**{"root": str(root), "size": (16,), "threads": 1, **settings})  # type: ignore[arg-type]


def write_dicom(path: Path, stored: np.ndarray, **elements: object) -> Path:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, "1.2.3"
    dataset.Rows, dataset.Columns = stored.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.PatientName = "Secret^Person"
    dataset.PixelData = stored.astype("<u2").tobytes()
    for name, value in elements.items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)
    return path
