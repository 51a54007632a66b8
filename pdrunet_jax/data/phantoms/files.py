"""Phantoms as files: a dataset folder, or annotations to be imported; PNG or DICOM images.

A phantom as the DICOM file of a digital X-ray, in the variants that hospitals have. Needs the extra `dicom`.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from pdrunet_jax.data.importers.common import save_index_mask
from pdrunet_jax.data.labelme.write import write_labelme
from pdrunet_jax.data.phantoms.anatomy import BONES
from pdrunet_jax.data.phantoms.phantom import Difficulty, Phantom, draw, generator
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.files import new_folder

SMALLEST = 32
"""Side, in pixels, below which a bone is no longer recognisable."""
FIELD_MM = 300.0
"""What the side of a phantom measures, for the pixel spacing in DICOM files."""

_SPLIT = 2  # a stream of random numbers of its own

_TOML = """\
name = "phantoms"
classes = {{ {classes} }}  # long bones; ribs, wrist and ankle bones, metal and markers are background
licence = "Synthetic: drawn by pdrunet_jax (seed {seed}); free of rights and of patients"
"""


@dataclass(frozen=True)
class PhantomOptions:
    """What is drawn, and as which files."""

    count: int = 120
    """Images."""
    seed: int = 0
    """Seed of all that is random in them."""
    size: int = 256
    """Height and width in pixels."""
    difficulty: Difficulty = "standard"
    """easy: dense bones, little noise; hard: faint bones, noise and scatter, casts, metal, wires."""
    by_bone: bool = False
    """Tell the bones apart: femur, tibia, fibula, humerus, radius and ulna instead of the one class bone."""
    images: Literal["png", "dicom"] = "png"
    """8-bit PNG, or 12-bit DICOM: MONOCHROME1 and 2, plain and JPEG 2000, with spacing; needs the extra dicom."""
    annotations: Literal["masks", "labelme"] = "masks"
    """masks: a dataset folder. labelme: images and LabelMe files, for import-labelme."""


def write_phantoms(root: Path, drawing: PhantomOptions) -> None:
    """Write phantoms as a dataset folder: images, masks, manifest.csv and dataset.toml; or as LabelMe files.

    About 60, 20 and 20 % of the patients train, validate and test. The folder appears complete or not at all. Raises
    `UserError` if `root` holds something already or cannot be written, or if there is nothing sensible to draw.
    """
    if drawing.count < 1:
        raise UserError(f"{drawing.count} phantoms cannot be drawn; ask for at least one")
    if drawing.size < SMALLEST:
        raise UserError(f"phantoms of {drawing.size} pixels show nothing; ask for at least {SMALLEST}")
    with new_folder(root, "phantoms") as folder:
        (folder / "images").mkdir()
        if drawing.annotations == "labelme":
            _write_labelme(folder, drawing)
        else:
            _write_dataset(folder, drawing)


def _write_dataset(folder: Path, drawing: PhantomOptions) -> None:
    (folder / "masks").mkdir()
    rows = []
    for index in range(drawing.count):
        phantom = draw(index, seed=drawing.seed, size=drawing.size, difficulty=drawing.difficulty)
        mask = f"masks/phantom_{index:05d}.png"
        if drawing.by_bone:
            save_index_mask(phantom.bones, folder / mask)
        else:
            Image.fromarray(phantom.mask * np.uint8(255)).save(folder / mask)
        rows.append((_save_image(phantom, index, folder, drawing), mask, phantom.patient))
    splits = _splits(sorted({patient for _, _, patient in rows}), drawing.seed)
    with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("image", "mask", "patient", "split"))
        writer.writerows((image, mask, patient, splits[patient]) for image, mask, patient in rows)
    named = ", ".join(f"{name} = {value}" for value, name in enumerate(BONES, start=1))
    text = _TOML.format(classes=named if drawing.by_bone else "bone = 255", seed=drawing.seed)
    (folder / "dataset.toml").write_text(text, encoding="utf-8")


def _write_labelme(folder: Path, drawing: PhantomOptions) -> None:
    (folder / "annotations").mkdir()
    for index in range(drawing.count):
        phantom = draw(index, seed=drawing.seed, size=drawing.size, difficulty=drawing.difficulty)
        image = _save_image(phantom, index, folder, drawing)
        mask, names = (phantom.bones, BONES) if drawing.by_bone else (phantom.mask, ("bone",))
        write_labelme(folder / f"annotations/phantom_{index:05d}.json", mask, names, f"../{image}")


def _save_image(phantom: Phantom, index: int, folder: Path, drawing: PhantomOptions) -> str:
    """Write the image; returns its path in `folder`."""
    name = f"images/phantom_{index:05d}"
    if drawing.images == "dicom":
        pass

        identity = f"{drawing.seed} {index} {drawing.size} {drawing.difficulty}"
        save_dicom(phantom, index, FIELD_MM / drawing.size, identity, folder / f"{name}.dcm")
        return f"{name}.dcm"
    Image.fromarray(phantom.image).save(folder / f"{name}.png")
    return f"{name}.png"


def _splits(patients: Sequence[str], seed: int) -> dict[str, str]:
    """A split for each patient; validation and test get one each as soon as there are three."""
    order = generator(seed, _SPLIT, 0).permutation(len(patients))
    share = max(1, round(0.2 * len(patients))) if len(patients) >= 3 else 0
    names = ["val"] * share + ["test"] * share + ["train"] * (len(patients) - 2 * share)
    return {patients[place]: name for place, name in zip(order.tolist(), names, strict=True)}


BITS = 12


def save_dicom(phantom: Phantom, index: int, spacing: float, identity: str, path: Path) -> None:
    """Write `phantom` with 12 bits stored and `spacing` in mm; the same `identity` gives the same file.

    Every second one is MONOCHROME1, every third is compressed by JPEG 2000 without loss, and every fifth has no
    window. Raises `UserError` if pydicom is not installed.
    """
    try:
        from pydicom import uid
        from pydicom.dataset import FileDataset, FileMetaDataset
    except ImportError:
        raise UserError("DICOM needs pydicom: pip install 'pdrunet-jax[dicom]'") from None
    most = 2**BITS - 1
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
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, BITS, BITS - 1, 0
    dataset.PixelSpacing = [f"{spacing:.6g}"] * 2
    if index % 5 != 4:
        dataset.WindowCenter, dataset.WindowWidth = 2 ** (BITS - 1), 2**BITS
    dataset.PixelData = (most - stored if inverted else stored).tobytes()
    dataset["PixelData"].VR = "OW"
    if index % 3 == 2:
        dataset.compress(uid.JPEG2000Lossless, generate_instance_uid=False)
    dataset.save_as(path, enforce_file_format=True)
