"""Masks as NIfTI label maps: `.nii.gz`, extra `nifti`."""

import gzip
from pathlib import Path

import numpy as np

from pdrunet_jax.errors import UserError
from pdrunet_jax.files import atomic_write
from pdrunet_jax.predict_geometry import Geometry

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
