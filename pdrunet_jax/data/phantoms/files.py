"""Write phantoms as a dataset folder, or as LabelMe files to import; images are PNG or DICOM."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from pdrunet_jax.data.folder import write_manifest
from pdrunet_jax.data.importers.common import write_description, write_mask
from pdrunet_jax.data.labelme.write import labelme_text
from pdrunet_jax.data.phantoms.anatomy import BONES
from pdrunet_jax.data.phantoms.phantom import Difficulty, Phantom, draw, generator
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.files import new_folder

SMALLEST = 32
"""Smallest side in pixels at which a bone is still recognisable."""

_FIELD_MM = 300.0  # side of a phantom, for the pixel spacing in DICOM files
_BITS = 12  # stored in DICOM files
_SPLIT = 2  # stream of random numbers; phantom.py has the others


@dataclass(frozen=True)
class PhantomOptions:
    """Number, look and file format of phantoms."""

    count: int = 120
    """Number of images."""
    seed: int = 0
    """Seed of the random scenes."""
    size: int = 256
    """Height and width in pixels."""
    difficulty: Difficulty = "standard"
    """easy: dense bones and little noise; hard: faint bones, more noise and scatter, casts, metal, wires."""
    by_bone: bool = False
    """One class for each of femur, tibia, fibula, humerus, radius and ulna, instead of the class bone."""
    images: Literal["png", "dicom"] = "png"
    """8-bit PNG, or 12-bit DICOM (MONOCHROME1 and 2, plain and JPEG 2000, with spacing; needs the extra dicom)."""
    annotations: Literal["masks", "labelme"] = "masks"
    """masks writes a dataset folder; labelme writes images and LabelMe files for import-labelme."""


def write_phantoms(root: Path, drawing: PhantomOptions) -> None:
    """Write phantoms as a dataset folder (images, masks, manifest.csv, dataset.toml) or as LabelMe files.

    About 60, 20 and 20 % of the patients are in train, val and test. The folder appears completely or not at all.
    Raises `UserError` if `root` is not empty or cannot be written, or if count or size is too small.
    """
    if drawing.count < 1:
        raise UserError(f"--count {drawing.count}: ask for at least one phantom")
    if drawing.size < SMALLEST:
        raise UserError(f"--size {drawing.size}: phantoms need at least {SMALLEST} pixels to show bones")
    labelme = drawing.annotations == "labelme"
    with new_folder(root, "phantoms") as folder:
        for name in ("images", "annotations" if labelme else "masks"):
            (folder / name).mkdir()
        rows = [_write_phantom(index, folder, drawing) for index in range(drawing.count)]
        if labelme:
            return
        splits = _splits(sorted({row["patient"] for row in rows}), drawing.seed)
        write_manifest(folder, [{**row, "split": splits[row["patient"]]} for row in rows])
        # Long bones only: ribs, wrist and ankle bones, metal and markers are background.
        classes = {name: value for value, name in enumerate(BONES, start=1)} if drawing.by_bone else {"bone": 255}
        licence = f"Synthetic: drawn by pdrunet_jax (seed {drawing.seed}); no rights reserved, no patients"
        write_description(folder, "phantoms", classes, licence=licence)


def _write_phantom(index: int, folder: Path, drawing: PhantomOptions) -> dict[str, str]:
    """Write the image of a phantom with its mask or LabelMe file; returns the manifest's row without the split."""
    phantom = draw(index, seed=drawing.seed, size=drawing.size, difficulty=drawing.difficulty)
    stem = f"phantom_{index:05d}"
    image, mask = f"images/{stem}.{'dcm' if drawing.images == 'dicom' else 'png'}", f"masks/{stem}.png"
    if drawing.images == "dicom":
        identity = f"{drawing.seed} {index} {drawing.size} {drawing.difficulty}"
        save_dicom(phantom, index, _FIELD_MM / drawing.size, identity, folder / image)
    else:
        Image.fromarray(phantom.image).save(folder / image)
    if drawing.annotations == "labelme":
        classes, names = (phantom.bones, BONES) if drawing.by_bone else (phantom.mask, ("bone",))
        text = labelme_text(classes, names, f"../{image}")
        (folder / f"annotations/{stem}.json").write_text(text, encoding="utf-8")
    elif drawing.by_bone:
        write_mask(phantom.bones, folder / mask)
    else:
        Image.fromarray(phantom.mask * np.uint8(255)).save(folder / mask)
    return {"image": image, "mask": mask, "patient": phantom.patient}


def _splits(patients: Sequence[str], seed: int) -> dict[str, str]:
    """Draw a split for each patient; val and test get at least one each if there are three patients.

    Simpler than `split.assign` and kept as it is: published scores refer to this split.
    """
    order = generator(seed, _SPLIT, 0).permutation(len(patients))
    share = max(1, round(0.2 * len(patients))) if len(patients) >= 3 else 0
    names = ["val"] * share + ["test"] * share + ["train"] * (len(patients) - 2 * share)
    return {patients[place]: name for place, name in zip(order.tolist(), names, strict=True)}


def save_dicom(phantom: Phantom, index: int, spacing: float, identity: str, path: Path) -> None:
    """Write a 12-bit digital X-ray in DICOM format, in a variant of hospitals that depends on `index`.

    Every second phantom is MONOCHROME1, every third is compressed (JPEG 2000, lossless), every fifth has no window.
    `spacing` is in mm; `identity` determines the file's UIDs. Raises `UserError` if pydicom is not installed.
    """
    try:
        from pydicom import uid
        from pydicom.dataset import FileDataset, FileMetaDataset
    except ImportError:
        raise UserError("DICOM needs pydicom: pip install 'pdrunet-jax[dicom]'") from None
    most = 2**_BITS - 1
    stored = np.floor(phantom.brightness * most + 0.5).astype("<u2")
    inverted = index % 2 == 1
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = uid.DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = uid.generate_uid(entropy_srcs=["phantom", identity])
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    dataset.Modality, dataset.Manufacturer = "DX", "pdrunet_jax phantom"
    dataset.PatientName, dataset.PatientID = f"Phantom^{phantom.patient}", phantom.patient
    dataset.Rows, dataset.Columns = stored.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME1" if inverted else "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, _BITS, _BITS - 1, 0
    dataset.PixelSpacing = [f"{spacing:.6g}"] * 2
    if index % 5 != 4:
        dataset.WindowCenter, dataset.WindowWidth = 2 ** (_BITS - 1), 2**_BITS
    dataset.PixelData = (most - stored if inverted else stored).tobytes()
    dataset["PixelData"].VR = "OW"
    if index % 3 == 2:
        dataset.compress(uid.JPEG2000Lossless, generate_instance_uid=False)
    dataset.save_as(path, enforce_file_format=True)
