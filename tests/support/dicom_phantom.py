"""A phantom as a 12-bit digital X-ray in DICOM format."""

from pathlib import Path

import numpy as np
import pytest

from pdrunet_jax.data.phantoms.phantom import Phantom

BITS = 12


def save_dicom(phantom: Phantom, index: int, spacing: float, path: Path) -> None:
    """Write `path` in a variant of hospitals that depends on `index`; `spacing` is in mm.

    Every second phantom is MONOCHROME1, every third is compressed (JPEG 2000, lossless), every fifth has no window.
    """
    uid = pytest.importorskip("pydicom").uid
    from pydicom.dataset import FileDataset, FileMetaDataset

    most = 2**BITS - 1
    stored = np.floor(phantom.brightness * most + 0.5).astype("<u2")
    inverted = index % 2 == 1
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = uid.DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = uid.generate_uid(entropy_srcs=["phantom", str(index)])
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    dataset.Modality, dataset.Manufacturer = "DX", "pdrunet_jax phantom"
    dataset.PatientName, dataset.PatientID = f"Phantom^{phantom.patient}", phantom.patient
    dataset.Rows, dataset.Columns = stored.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME1" if inverted else "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, BITS, BITS - 1, 0
    dataset.PixelSpacing = [f"{spacing:.6g}"] * 2
    if index % 5 != 4:
        dataset.WindowCenter, dataset.WindowWidth = 2 ** (BITS - 1), 2**BITS
    dataset.PixelData = (most - stored if inverted else stored).tobytes()
    dataset["PixelData"].VR = "OW"
    if index % 3 == 2:
        dataset.compress(uid.JPEG2000Lossless, generate_instance_uid=False)
    dataset.save_as(path, enforce_file_format=True)
