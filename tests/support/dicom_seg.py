"""DICOM segmentations, as a PACS or 3D Slicer exports them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset

from tests.support.small_data import write_dicom


def write_seg(path: Path, frames: np.ndarray, labels: Sequence[str], refer_to: str, **elements: Any) -> Path:
    """A DICOM segmentation: one frame of bits for each label."""
    bits = np.packbits(frames.astype(np.uint8).ravel(), bitorder="little").tobytes()
    write_dicom(path, np.zeros(frames.shape[1:], np.uint8), SOPClassUID="1.2.840.10008.5.1.4.1.1.66.4")
    dataset = pydicom.dcmread(path)
    dataset.NumberOfFrames, dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = len(frames), 1, 1, 0
    dataset.SegmentationType = "BINARY"
    dataset.SegmentSequence = [_item(SegmentNumber=i, SegmentLabel=label) for i, label in enumerate(labels, start=1)]
    source = _item(SourceImageSequence=[_item(ReferencedSOPInstanceUID=refer_to)])
    dataset.PerFrameFunctionalGroupsSequence = [
        _item(DerivationImageSequence=[source], SegmentIdentificationSequence=[_item(ReferencedSegmentNumber=i)])
        for i in range(len(frames), 0, -1)
    ]
    dataset.PixelData = bits + b"\0" * (len(bits) % 2)
    for key, value in elements.items():
        setattr(dataset, key, value)
    dataset.save_as(path)
    return path


def _item(**elements: Any) -> Dataset:
    item = Dataset()
    for key, value in elements.items():
        setattr(item, key, value)
    return item
