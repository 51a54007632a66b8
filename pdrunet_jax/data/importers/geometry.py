"""Volumes of one slice with their position in space, read by SimpleITK (extra `volumes`): NRRD, NIfTI, MetaImage.

Positions are ITK's: LPS coordinates in mm. A mask that was turned, mirrored or cropped lies on its image again by them.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from pdrunet_jax.data.importers.files import is_inside, problem
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.extras import how_to_install

VOLUMES = (".nrrd", ".nii", ".nii.gz", ".mha", ".mhd")
"""File name extensions of volumes."""

_READERS = {
    ".nrrd": "NrrdImageIO",
    ".nii": "NiftiImageIO",
    ".gz": "NiftiImageIO",
    ".mha": "MetaImageIO",
    ".mhd": "MetaImageIO",
    ".png": "PNGImageIO",
    ".jpg": "JPEGImageIO",
    ".jpeg": "JPEGImageIO",
    ".tif": "TIFFImageIO",
    ".tiff": "TIFFImageIO",
    ".bmp": "BMPImageIO",
    ".dcm": "GDCMImageIO",
    ".dicom": "GDCMImageIO",
}
_DETACHED = re.compile(rb"^\s*(?:data ?file\s*:|ElementDataFile\s*=)[ \t]*([^\r\n]*)", re.I | re.M)
_NEAR = 0.05  # pixels: positions are stored with the precision of float32


@dataclass(frozen=True)
class Grid:
    """Where the pixels of an image or volume lie."""

    size: tuple[int, ...]
    """Number of voxels along the three axes."""
    origin: np.ndarray
    """(3,): centre of the first voxel in mm."""
    steps: np.ndarray
    """(3, 3): for each axis (columns of the matrix), the vector in mm from one voxel to the next."""
    spoken: str
    """Size, spacing, origin and direction, for messages."""

    def index_of(self, other: "Grid") -> tuple[np.ndarray, np.ndarray] | None:
        """The matrix (3, 3) and offset (3,), in whole numbers, from indices of `other` to indices of this grid.

        None if the grids do not coincide, turned, mirrored or shifted by whole pixels.
        """
        try:
            inverse = np.linalg.inv(self.steps)
        except np.linalg.LinAlgError:
            return None
        matrix, offset = inverse @ other.steps, inverse @ (other.origin - self.origin)
        if not (np.isfinite(matrix).all() and np.isfinite(offset).all() and np.abs(offset).max() < 1e6):
            return None
        # The axis of a single voxel may have any length.
        for axis in (axis for axis in range(3) if other.size[axis] == 1):
            length = np.linalg.norm(matrix[:, axis])
            matrix[:, axis] /= length if length else 1.0
        whole, start = np.rint(matrix), np.rint(offset)
        reach = np.abs(matrix - whole) @ (np.array(other.size) - 1) + np.abs(offset - start)
        across = np.abs(matrix - whole)
        if (reach > _NEAR).any() or across.max() > 0.5 or not (np.abs(whole).sum(0) == 1).all():
            return None
        return (whole.astype(int), start.astype(int)) if (np.abs(whole).sum(1) == 1).all() else None


@dataclass(frozen=True)
class Volume:
    """A volume of one slice."""

    values: np.ndarray
    """(size x, size y, size z, components)."""
    grid: Grid
    segments: dict[tuple[int, int], str] = field(default_factory=dict)
    """Names of segments by component and value, of a 3D Slicer segmentation."""

    @property
    def plane(self) -> tuple[int, int]:
        """The axes of columns and rows: all but the last of a single voxel."""
        single = max(axis for axis in range(3) if self.grid.size[axis] == 1)
        columns, rows = (axis for axis in range(3) if axis != single)
        return columns, rows

    def picture(self) -> np.ndarray:
        """(H, W, components): columns along the first axis of the plane, rows along the second."""
        columns, rows = self.plane
        return np.squeeze(self.values, axis=3 - columns - rows).transpose(1, 0, 2)


def require_simpleitk() -> Any:
    """The module SimpleITK. Raises `UserError` if it is not installed."""
    try:
        import SimpleITK
    except ImportError:
        raise UserError(f"volumes need SimpleITK: {how_to_install('volumes')}") from None
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    return SimpleITK


def read_grid(path: Path, name: str, root: Path) -> Grid:
    """Where ITK places an image or volume. Raises `DataError` that calls it `name`."""
    return _grid(_header(path, name, root), name)


def read_volume(path: Path, name: str, root: Path) -> Volume:
    """Read a volume of one slice below `root`. Raises `DataError` that calls it `name`."""
    sitk = require_simpleitk()
    reader = _header(path, name, root)
    grid = _grid(reader, name)
    try:
        with _quiet():
            image = reader.Execute()
        values = sitk.GetArrayFromImage(image)
    except RuntimeError:
        raise problem(name, "damaged or truncated volume") from None
    components = image.GetNumberOfComponentsPerPixel()
    values = values.reshape(*reversed(grid.size), components).transpose(2, 1, 0, 3)
    return Volume(values, grid, _segments(reader))


def exif_orientation(path: Path) -> int:
    """The EXIF orientation of an image file, which ITK ignores; 1 for others."""
    if not path.is_file():  # a pipe would be waited for
        return 1
    try:
        with Image.open(path) as image:
            orientation: Any = image.getexif().get(ExifTags.Base.Orientation)
            return orientation if isinstance(orientation, int) else 1
    except Exception:  # not a file that Pillow reads
        return 1


def place(mask: Volume, grid: Grid, image: Volume | None, name: str, where: str) -> np.ndarray:
    """The mask's values on an image's pixels: (H, W, components), 0 where the mask has none.

    Args:
        mask: The mask.
        grid: Position of the image.
        image: The image if it is a volume itself; otherwise its columns and rows are the first two axes.
        name: The mask, in messages.
        where: The image, in messages.

    Raises `DataError` with both positions if the mask cannot lie on the image.
    """
    found = grid.index_of(mask.grid)
    if found is None:
        raise problem(
            name,
            f"it cannot lie on {where}. Mask: {mask.grid.spoken}. Image: {grid.spoken}. Resample the mask to the image "
            "in 3D Slicer or ITK-SNAP, or, if both merely have the same pixels, give --geometry ignore",
        )
    matrix, offset = found
    axes = [int(np.flatnonzero(row)[0]) for row in matrix]
    values = mask.values.transpose(*axes, 3)
    for axis in range(3):
        if matrix[axis].sum() < 0:
            values = np.flip(values, axis)
            offset[axis] -= values.shape[axis] - 1
    result = np.zeros((*grid.size, values.shape[3]), values.dtype)
    ours = tuple(slice(max(0, offset[i]), max(0, offset[i] + values.shape[i])) for i in range(3))
    theirs = tuple(slice(max(0, -offset[i]), max(0, min(values.shape[i], grid.size[i] - offset[i]))) for i in range(3))
    inside = values[theirs]
    if np.count_nonzero(values) != np.count_nonzero(inside):
        raise problem(name, f"parts of it lie outside of {where}. Mask: {mask.grid.spoken}. Image: {grid.spoken}")
    result[tuple(slice(part.start, part.start + inside.shape[i]) for i, part in enumerate(ours))] = inside
    return (Volume(result, grid) if image is None else Volume(result, image.grid)).picture()


def _header(path: Path, name: str, root: Path) -> Any:
    """A SimpleITK reader with the header of a file, whose pixels are in it or beside it."""
    sitk = require_simpleitk()
    if not is_inside(path, root):
        raise problem(name, "a link that leads out of the folder; refused")
    if not path.is_file():
        raise problem(name, "not a regular file")
    if path.name.lower().endswith((".nrrd", ".mha", ".mhd")):
        with path.open("rb") as file:
            start = file.read(1 << 20)
        head = start.split(b"\n\n", 1)[0] if start.startswith(b"NRRD") else start[:65536]
        for other in _DETACHED.findall(head):
            text = other.decode("utf-8", "replace").strip()
            beside = path.parent / text
            if text.upper() != "LOCAL" and ("/" in text or "\\" in text or not beside.is_file()):
                raise problem(name, "its pixels are in another file, which is not beside it; save it as one file")
            if text.upper() != "LOCAL" and not is_inside(beside, root):
                raise problem(name, "its pixels are in a file out of the folder; refused")
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO(_READERS[path.suffix.lower()])
    try:
        with _quiet():
            reader.ReadImageInformation()
        voxels = float(np.prod([float(side) for side in reader.GetSize()])) * reader.GetNumberOfComponents()
    except RuntimeError:
        raise problem(name, "ITK cannot read it: damaged, or a position that is none") from None
    if not 0 < voxels <= 4 * (Image.MAX_IMAGE_PIXELS or 1 << 62):
        raise problem(name, f"more than {Image.MAX_IMAGE_PIXELS:,} pixels: refused as a bomb")
    return reader


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep ITK's libraries from writing to standard error; their exceptions say enough."""
    sys.stderr.flush()
    with open(os.devnull, "wb") as nowhere:
        kept = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _grid(reader: Any, name: str) -> Grid:
    size, count = list(reader.GetSize()), reader.GetDimension()
    if count < 2 or any(side != 1 for side in size[3:]):
        raise problem(name, f"{count} dimensions; only single slices are read")
    if min(*size[:3], 1 if count == 2 else size[2]) != 1:
        raise problem(name, f"a volume of {'x'.join(map(str, size))} voxels; only single slices are read")
    spacing, origin = np.ones(3), np.zeros(3)
    direction = np.eye(3)
    kept = min(count, 3)
    spacing[:kept] = reader.GetSpacing()[:kept]
    origin[:kept] = reader.GetOrigin()[:kept]
    direction[:kept, :kept] = np.reshape(reader.GetDirection(), (count, count))[:kept, :kept]
    size = [*size[:kept], *[1] * (3 - kept)]
    words = (
        f"{'x'.join(map(str, size))} voxels of {'x'.join(f'{item:.6g}' for item in spacing)} mm, first at "
        f"({', '.join(f'{item:.6g}' for item in origin)}), axes "
        f"{' '.join('(' + ', '.join(f'{item:.4g}' for item in axis) + ')' for axis in direction.T)}"
    )
    return Grid(tuple(size), origin, direction * spacing, words)


def _segments(reader: Any) -> dict[tuple[int, int], str]:
    """Names of the segments that 3D Slicer writes into the header."""
    found: dict[tuple[int, int], str] = {}
    try:
        keys = {key: reader.GetMetaData(key) for key in reader.GetMetaDataKeys() if key.startswith("Segment")}
        for key, name in keys.items():
            if match := re.fullmatch(r"Segment(\d{1,4})_Name", key):
                layer = int(keys.get(f"Segment{match[1]}_Layer") or match[1])
                found[layer, int(keys.get(f"Segment{match[1]}_LabelValue") or 1)] = name.strip()
    except (RuntimeError, ValueError):  # text that is not UTF-8, or no numbers
        return {}
    return found
