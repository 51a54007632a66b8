"""Masks as segmentations of 3D Slicer: `.seg.nrrd`, extra `nrrd`."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pdrunet_jax.errors import UserError
from pdrunet_jax.files import atomic_write
from pdrunet_jax.pictures import colour_of
from pdrunet_jax.predict_geometry import Geometry


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
