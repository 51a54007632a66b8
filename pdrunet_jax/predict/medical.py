"""Where ITK, and so 3D Slicer and ITK-SNAP, puts an image: a segmentation has to be put there to lie over it.

ITK takes an image's place from other elements than a radiologist takes its scale from: of projection radiographs it
knows the detector's spacing alone.

Masks as NIfTI label maps: `.nii.gz`, extra `nifti`.

Masks as segmentations of 3D Slicer: `.seg.nrrd`, extra `nrrd`.
"""

import gzip
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pdrunet_jax.data.overlay import colour_of
from pdrunet_jax.predict.inputs import is_dicom
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.files import atomic_write

PROJECTIONS = ("1.2.840.10008.5.1.4.1.1.1", "1.2.840.10008.5.1.4.1.1.12.1", "1.2.840.10008.5.1.4.1.1.12.2")
"""SOP classes of computed radiography (and, with more numbers behind, of digital X-ray), angiography, fluoroscopy."""

SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"

_ELEMENTS = (
    "SOPClassUID",
    "PixelSpacing",
    "ImagerPixelSpacing",
    "NominalScannedPixelSpacing",
    "SpacingBetweenSlices",
    "ImagePositionPatient",
    "ImageOrientationPatient",
)

_ORIENTATION = 0x0112
_UNTURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""By EXIF orientation what brings an upright picture back to how the file stores it."""


@dataclass(frozen=True)
class Geometry:
    """Where ITK puts an image, in its LPS coordinates."""

    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """mm between columns, rows and slices."""
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """mm, of the centre of the first pixel."""
    axes: tuple[tuple[float, ...], ...] = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    """Unit vectors along a row, along a column, and from slice to slice."""
    unturn: Image.Transpose | None = None
    """What brings the upright mask to the file's own order of pixels, which ITK does not turn."""

    @property
    def steps(self) -> np.ndarray:
        """(3, 3): a row for each axis of `voxels`, what one step along it is in mm."""
        return np.array(self.axes) * np.array(self.spacing)[:, None]

    def voxels(self, mask: np.ndarray) -> np.ndarray:
        """A mask (H, W) of the upright image as the file's own volume: uint8 (columns, rows, 1)."""
        stored = mask if self.unturn is None else np.asarray(Image.fromarray(mask).transpose(self.unturn))
        return stored.astype(np.uint8).T[:, :, None]


def read_geometry(path: Path) -> Geometry:
    """Where ITK puts the image in a file that `read_image` has read; what is absent or damaged is ITK's default."""
    if is_dicom(path):
        return _of_dicom(path)
    with Image.open(path) as image:
        across, down = 1.0, 1.0
        if image.format == "JPEG" and image.info.get("jfif_unit") in (1, 2):
            unit = 25.4 if image.info["jfif_unit"] == 1 else 10.0
            across, down = (unit / value if value else 1.0 for value in image.info["jfif_density"])
        elif image.format == "TIFF" and image.tag_v2.get(296) in (2, 3):  # type: ignore[attr-defined]
            unit = 25.4 if image.tag_v2[296] == 2 else 10.0  # type: ignore[attr-defined]
            tags = [image.tag_v2.get(tag) for tag in (282, 283)]  # type: ignore[attr-defined]
            across, down = (unit / float(value) if value else 1.0 for value in tags)
        return Geometry((across, down, 1.0), unturn=_UNTURN.get(image.getexif().get(_ORIENTATION, 1)))


def _of_dicom(path: Path) -> Geometry:
    import pydicom

    # pydicom's warnings about malformed elements quote them, and they may be a patient's name.
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    dataset = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_ELEMENTS), force=True)
    kind = str(dataset.get("SOPClassUID", ""))
    if kind in PROJECTIONS or kind.startswith(f"{PROJECTIONS[0]}."):
        sources: tuple[str, ...] = ("ImagerPixelSpacing",)
    elif kind == SECONDARY_CAPTURE:
        sources = ("PixelSpacing", "NominalScannedPixelSpacing")
    else:
        sources = ("PixelSpacing",)
    spacings = (_numbers(dataset, source, 2) for source in sources)
    down, across = next((found for found in spacings if found and min(found) > 0), (1.0, 1.0))
    between = _numbers(dataset, "SpacingBetweenSlices", 1)
    origin = _numbers(dataset, "ImagePositionPatient", 3) or (0.0, 0.0, 0.0)
    place = Geometry(
        (across, down, between[0] if between and between[0] > 0 else 1.0), (origin[0], origin[1], origin[2])
    )
    cosines = _numbers(dataset, "ImageOrientationPatient", 6)
    if cosines is None:
        return place
    row, column = np.array(cosines[:3]), np.array(cosines[3:])
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if not all(abs(length - 1) < 1e-2 for length in lengths) or abs(row @ column) > 1e-2:
        return place
    row, column = row / lengths[0], column / lengths[1]
    axes = tuple(tuple(axis.tolist()) for axis in (row, column, np.cross(row, column)))
    return Geometry(place.spacing, place.origin, axes)


def _numbers(dataset: Any, element: str, count: int) -> tuple[float, ...] | None:
    """The element as `count` finite numbers, or None."""
    try:
        value = dataset.get(element)
        numbers = tuple(float(item) for item in (value if count > 1 else [value]))
    except (TypeError, ValueError, OverflowError):
        return None
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None


_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""DICOM and ITK count x and y to the patient's left and back, NIfTI to the right and front."""

_SCANNER = 1
"""NIfTI's code for the coordinates of the device that took the image."""


def require_nifti() -> None:
    """Raise `UserError` if NiBabel is not installed."""
    try:
        import nibabel  # noqa: F401
    except ImportError:
        raise UserError("--nifti needs NiBabel: pip install 'pdrunet-jax[nifti]'") from None


def write_label_map(path: Path, mask: np.ndarray, geometry: Geometry) -> None:
    """Write a mask (H, W) of class indices as a volume of one slice. Raises `OSError` if the disk refuses."""
    import nibabel

    affine = np.eye(4)
    affine[:3, :3] = geometry.steps.T
    affine[:3, 3] = geometry.origin
    affine = _LPS_TO_RAS @ affine
    image = nibabel.Nifti1Image(geometry.voxels(mask), affine)
    image.set_qform(affine, _SCANNER)
    image.set_sform(affine, _SCANNER)
    image.header.set_xyzt_units("mm")
    atomic_write(path, gzip.compress(image.to_bytes(), mtime=0))


def require_nrrd() -> None:
    """Raise `UserError` if pynrrd is not installed."""
    try:
        import nrrd  # noqa: F401
    except ImportError:
        raise UserError("--nrrd needs pynrrd: pip install 'pdrunet-jax[nrrd]'") from None


def write_segmentation(path: Path, mask: np.ndarray, names: Sequence[str], geometry: Geometry) -> None:
    """Write a mask (H, W) of class indices; class i + 1 is called `names[i]`. Raises `OSError` if the disk refuses."""
    import nrrd

    voxels = geometry.voxels(mask)
    header: dict[str, Any] = {
        "type": "uint8",
        "dimension": 3,
        "space": "left-posterior-superior",
        "sizes": np.array(voxels.shape),
        "kinds": ["domain"] * 3,
        "space directions": geometry.steps,
        "space origin": np.array(geometry.origin),
        "encoding": "gzip",
        "Segmentation_ContainedRepresentationNames": "Binary labelmap|",
        "Segmentation_MasterRepresentation": "Binary labelmap",
        "Segmentation_ReferenceImageExtentOffset": "0 0 0",
    }
    for number, name in enumerate(names):
        colour = " ".join(f"{value / 255:.6f}" for value in colour_of(number + 1))
        fields = {
            "ID": f"Segment_{number + 1}",
            "Name": " ".join(name.split()),
            "Color": colour,
            "LabelValue": str(number + 1),
            "Layer": "0",
            "Extent": f"0 {voxels.shape[0] - 1} 0 {voxels.shape[1] - 1} 0 0",
        }
        header |= {f"Segment{number}_{key}": value for key, value in fields.items()}
    file = io.BytesIO()
    nrrd.write(file, voxels, header)
    atomic_write(path, file.getvalue())
