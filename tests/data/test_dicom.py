"""DICOM files as found: without preamble, with padding, look-up tables and windows that do not fit."""

import io
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from pdrunet_jax.data.images import read_image
from pdrunet_jax.runtime.errors import DataError
from tests.support.small_data import write_dicom

STORED = np.tile(np.arange(100, 4100, 100, dtype=np.uint16), (20, 1))


def table(entries: list[int], first: int, bits: int) -> list[Dataset]:
    item = Dataset()
    item.LUTDescriptor = [len(entries), first, bits]
    item["LUTDescriptor"].VR = "US"
    item.add_new("LUTData", "US", entries)
    return [item]


def grey(path: Path, remarks: list[str] | None = None) -> np.ndarray:
    return read_image(path, remarks=remarks)[:, :, 0]


def test_padding_is_black_and_does_not_set_the_range(tmp_path: Path) -> None:
    plain = grey(write_dicom(tmp_path / "plain.dcm", STORED[:, :-4]))
    for name, value, elements in (
        ("high", 4095, {"PixelPaddingValue": 4095}),
        ("range", 4090, {"PixelPaddingValue": 4095, "PixelPaddingRangeLimit": 4080}),
        ("low", 0, {"PixelPaddingValue": 0}),
    ):
        padded = STORED.copy()
        padded[:, -4:] = value
        read = grey(write_dicom(tmp_path / f"{name}.dcm", padded, **elements))
        np.testing.assert_allclose(read[:, :-4], plain, atol=1e-3)
        assert (read[:, -4:] == 0).all()
    padded = STORED.astype(np.int16)
    padded[:, -4:] = -32768
    signed = {"PixelRepresentation": 1, "BitsStored": 16, "HighBit": 15, "PixelPaddingValue": -32768}
    read = grey(write_dicom(tmp_path / "signed.dcm", padded.view(np.uint16), **signed))
    np.testing.assert_allclose(read[:, :-4], plain, atol=1e-3)
    inverted = {"PhotometricInterpretation": "MONOCHROME1", "PixelPaddingValue": 0}
    padded = STORED.copy()
    padded[:, -4:] = 0
    assert (grey(write_dicom(tmp_path / "m1.dcm", padded, **inverted))[:, -4:] == 0).all()
    whole = np.full_like(STORED, 7)
    assert not grey(write_dicom(tmp_path / "all.dcm", whole, PixelPaddingValue=7)).any()


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_look_up_tables_come_before_windows_and_ranges(tmp_path: Path, bits: int) -> None:
    most = 2**bits - 1
    entries = [round(most * (1 - index / 4095) ** 2) for index in range(4096)]
    expected = np.array(entries)[STORED] / most * 255
    voi = write_dicom(tmp_path / "voi.dcm", STORED, WindowCenter=9, WindowWidth=9)
    dataset = pydicom.dcmread(voi)
    dataset.VOILUTSequence = table(entries, 0, bits)
    dataset.save_as(voi)
    np.testing.assert_allclose(grey(voi), expected, atol=1e-3)
    modality = write_dicom(tmp_path / "modality.dcm", STORED)
    dataset = pydicom.dcmread(modality)
    dataset.ModalityLUTSequence = table(entries, 0, bits)
    dataset.save_as(modality)
    read = grey(modality)
    assert read[0, 0] == 255
    assert read[0, -1] == 0
    assert (np.diff(read[0]) <= 0).all()


@pytest.mark.parametrize(("centre", "width"), [(40, 80), (0.5, 1), (32768, 65536)])
def test_a_window_without_contrast_gives_way_to_the_range_with_a_remark(
    tmp_path: Path, centre: float, width: float
) -> None:
    remarks: list[str] = []
    read = grey(write_dicom(tmp_path / "x.dcm", STORED, WindowCenter=centre, WindowWidth=width), remarks)
    np.testing.assert_allclose(read, grey(write_dicom(tmp_path / "y.dcm", STORED)))
    assert "window leaves next to no contrast" in remarks[0]
    remarks.clear()
    read_image(write_dicom(tmp_path / "z.dcm", np.full_like(STORED, 7), WindowCenter=40, WindowWidth=80), 1, remarks)
    assert remarks == []  # the image itself is constant, which the check says


def test_files_without_preamble_or_transfer_syntax_are_read(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "x.dcm", STORED)
    expected, dataset = grey(path), pydicom.dcmread(path)
    for name, implicit in (("explicit", False), ("implicit", True)):
        file = io.BytesIO()
        bare = Dataset({element.tag: element for element in dataset})
        bare.save_as(file, implicit_vr=implicit, little_endian=True)
        for suffix in (".dcm", ""):
            (tmp_path / f"{name}{suffix}").write_bytes(file.getvalue())
            np.testing.assert_array_equal(grey(tmp_path / f"{name}{suffix}"), expected)


def test_other_contents_are_named(tmp_path: Path) -> None:
    for uid, what in (("1.2.840.10008.5.1.4.1.1.66.4", "Segmentation"), ("1.2.840.10008.5.1.4.1.1.88.11", "SR")):
        with pytest.raises(DataError, match=f"another kind: .*{what}"):
            read_image(write_dicom(tmp_path / "x.dcm", STORED, SOPClassUID=uid))
    assert grey(write_dicom(tmp_path / "private.dcm", STORED, SOPClassUID="1.2.3.4")).any()
