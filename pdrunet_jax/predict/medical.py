"""Segmentations for medical viewers: `.seg.nrrd` for 3D Slicer (extra `nrrd`), `.nii.gz` for ITK-SNAP (extra `nifti`).

Both place the mask where ITK, and with it 3D Slicer and ITK-SNAP, places the image, so that it overlays it. For
projection radiographs ITK uses the detector spacing only, not the calibrated spacing that areas are measured with.
"""

import gzip
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import TiffImageFile

from pdrunet_jax.data.dicom import dicom_numbers, import_pydicom, is_dicom
from pdrunet_jax.data.overlay import colour_of
from pdrunet_jax.runtime.opening import open_regular, read_regular

PROJECTIONS = ("1.2.840.10008.5.1.4.1.1.1", "1.2.840.10008.5.1.4.1.1.12.1", "1.2.840.10008.5.1.4.1.1.12.2")
"""SOP classes: computed radiography (as a prefix, also digital X-ray), angiography, fluoroscopy."""
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_TO_STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""For each EXIF orientation, the transform from the upright picture back to the stored one."""

# DICOM and ITK: x to the patient's left, y to the back. NIfTI: to the right and front.
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_SCANNER_COORDINATES = 1  # NIfTI qform and sform code


@dataclass(frozen=True)
class Geometry:
    """Position of an image in ITK's LPS coordinates."""

    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """mm between columns, rows and slices."""
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Centre of the first pixel, in mm."""
    axes: tuple[tuple[float, ...], ...] = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    """Unit vectors along a row, along a column, and from slice to slice."""
    to_stored: Image.Transpose | None = None
    """Transform from the upright mask to the file's own pixel order; ITK ignores EXIF orientation."""

    @property
    def steps(self) -> np.ndarray:
        """(3, 3): for each axis of `voxels` (rows), the vector in mm from one voxel to the next."""
        return np.array(self.axes) * np.array(self.spacing)[:, None]

    def voxels(self, mask: np.ndarray) -> np.ndarray:
        """A mask (H, W) of the upright image as a volume in stored pixel order: uint8 (columns, rows, 1)."""
        stored = mask if self.to_stored is None else np.asarray(Image.fromarray(mask).transpose(self.to_stored))
        return stored.astype(np.uint8).T[:, :, None]


def read_geometry(path: Path) -> Geometry:
    """Geometry that ITK reads from an image file; missing or invalid fields get ITK's defaults."""
    if is_dicom(path):
        return _dicom_geometry(path)
    with Image.open(io.BytesIO(read_regular(path))) as image:
        across, down = 1.0, 1.0
        if image.format == "JPEG" and (unit := {1: 25.4, 2: 10.0}.get(image.info.get("jfif_unit", 0))):
            across, down = (unit / value if value else 1.0 for value in image.info["jfif_density"])
        elif isinstance(image, TiffImageFile) and (unit := {2: 25.4, 3: 10.0}.get(image.tag_v2.get(296, 1))):
            tags = (image.tag_v2.get(tag) for tag in (282, 283))
            across, down = (unit / float(value) if value else 1.0 for value in tags)
        stored = _TO_STORED.get(image.getexif().get(ExifTags.Base.Orientation, 1))
        return Geometry((across, down, 1.0), to_stored=stored)


def nifti_file(mask: np.ndarray, geometry: Geometry) -> bytes:
    """A mask (H, W) of class indices as a NIfTI label map of one slice, compressed."""
    import nibabel

    affine = np.eye(4)
    affine[:3, :3] = geometry.steps.T
    affine[:3, 3] = geometry.origin
    affine = _LPS_TO_RAS @ affine
    image = nibabel.Nifti1Image(geometry.voxels(mask), affine)
    image.set_qform(affine, _SCANNER_COORDINATES)
    image.set_sform(affine, _SCANNER_COORDINATES)
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), mtime=0)


def nrrd_file(mask: np.ndarray, labels: Sequence[str], geometry: Geometry) -> bytes:
    """A mask (H, W) as a 3D Slicer segmentation; class i + 1 is named `labels[i]`.

    Layers (H, W, K) of overlapping classes become layers of the segmentation.
    """
    import nrrd

    overlap = mask.ndim == 3
    voxels = geometry.voxels(mask[..., 0] if overlap else mask)
    shape, steps, kinds = voxels.shape, geometry.steps, ["domain"] * 3
    if overlap:
        voxels = np.stack([geometry.voxels(layer) for layer in np.moveaxis(mask, -1, 0)])
        steps, kinds = np.vstack([np.full(3, np.nan), steps]), ["list", *kinds]
    header: dict[str, Any] = {
        "type": "uint8",
        "dimension": voxels.ndim,
        "space": "left-posterior-superior",
        "sizes": np.array(voxels.shape),
        "kinds": kinds,
        "space directions": steps,
        "space origin": np.array(geometry.origin),
        "encoding": "gzip",
        "Segmentation_ContainedRepresentationNames": "Binary labelmap|",
        "Segmentation_MasterRepresentation": "Binary labelmap",
        "Segmentation_ReferenceImageExtentOffset": "0 0 0",
    }
    for number in range(len(labels)):
        fields = {
            "ID": f"Segment_{number + 1}",
            "Name": f"{{name {number}}}",
            "Color": " ".join(f"{value / 255:.6f}" for value in colour_of(number + 1)),
            "LabelValue": "1" if overlap else str(number + 1),
            "Layer": str(number if overlap else 0),
            "Extent": f"0 {shape[0] - 1} 0 {shape[1] - 1} 0 0",
        }
        header |= {f"Segment{number}_{key}": value for key, value in fields.items()}
    file = io.BytesIO()
    nrrd.write(file, voxels, header)
    # pynrrd writes ASCII only; 3D Slicer reads and writes names in UTF-8.
    text, end, content = file.getvalue().partition(b"\n\n")
    for number, label in enumerate(labels):
        text = text.replace(f"{{name {number}}}".encode(), " ".join(label.split()).encode(), 1)
    return text + end + content


def _dicom_geometry(path: Path) -> Geometry:
    with open_regular(path) as file:
        dataset = import_pydicom().dcmread(file, stop_before_pixels=True, force=True)

    # ITK looks for the spacing in different elements for each kind of image.
    kind = str(dataset.get("SOPClassUID", ""))
    if kind in PROJECTIONS or kind.startswith(f"{PROJECTIONS[0]}."):
        sources: tuple[str, ...] = ("ImagerPixelSpacing",)
    elif kind == SECONDARY_CAPTURE:
        sources = ("PixelSpacing", "NominalScannedPixelSpacing")
    else:
        sources = ("PixelSpacing",)
    spacings = (dicom_numbers(dataset, source, 2) for source in sources)
    down, across = next((found for found in spacings if found and min(found) > 0), (1.0, 1.0))
    between = dicom_numbers(dataset, "SpacingBetweenSlices", 1)
    spacing = (across, down, between[0] if between and between[0] > 0 else 1.0)
    x, y, z = dicom_numbers(dataset, "ImagePositionPatient", 3) or (0.0, 0.0, 0.0)

    # Direction cosines that are missing or not orthonormal are ignored.
    row, column = np.reshape(dicom_numbers(dataset, "ImageOrientationPatient", 6) or np.zeros(6), (2, 3))
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if not all(abs(length - 1) < 1e-2 for length in lengths) or abs(row @ column) > 1e-2:
        return Geometry(spacing, (x, y, z))
    row, column = row / lengths[0], column / lengths[1]
    return Geometry(spacing, (x, y, z), tuple(tuple(axis.tolist()) for axis in (row, column, np.cross(row, column))))
