"""Images of every kind come out right, and bad ones as an error that names the file."""

from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, JPEGLSLossless
from small_data import noise, save

from pdrunet_jax.data.images import read_image, read_spacing, resize_image
from pdrunet_jax.errors import DataError

RGB = np.stack([noise(1), noise(2), noise(3)], axis=-1)


@pytest.mark.parametrize(
    ("extension", "mode"),
    [("png", mode) for mode in ("1", "L", "LA", "RGB", "RGBA", "P")]
    + [("tif", mode) for mode in ("1", "L", "LA", "RGB", "RGBA", "P", "CMYK")]
    + [("bmp", mode) for mode in ("1", "L", "RGB", "P")]
    + [("jpg", mode) for mode in ("L", "RGB", "CMYK")],
)
def test_eight_bit_grey_is_exactly_pillows(tmp_path: Path, extension: str, mode: str) -> None:
    path = save(Image.fromarray(RGB).convert(mode), tmp_path / f"x.{extension}")
    pixels = read_image(path)
    assert pixels.dtype == np.uint8
    with Image.open(path) as reference:
        np.testing.assert_array_equal(pixels[:, :, 0], np.asarray(reference.convert("L")))


def test_three_channels_are_red_green_blue(tmp_path: Path) -> None:
    np.testing.assert_array_equal(read_image(save(RGB, tmp_path / "x.png"), 3), RGB)
    grey = read_image(save(noise(0), tmp_path / "g.png"), 3)
    np.testing.assert_array_equal(grey, np.repeat(noise(0)[:, :, None], 3, axis=2))


def test_palette_images_with_transparency_are_read(tmp_path: Path) -> None:
    image = Image.fromarray(RGB).convert("P")
    path = save(image, tmp_path / "x.png", transparency=bytes(range(200)))
    np.testing.assert_array_equal(read_image(path)[:, :, 0], np.asarray(image.convert("L")))


@pytest.mark.parametrize("extension", ["png", "tif"])
def test_sixteen_bit_is_scaled_by_its_own_range(tmp_path: Path, extension: str) -> None:
    deep = (1000 + 10 * noise(0).astype(np.uint16)).astype(np.uint16)
    pixels = read_image(save(deep, tmp_path / f"x.{extension}"))
    assert pixels.dtype == np.float32
    assert pixels.min() == 0
    assert pixels.max() == 255
    assert np.abs(pixels[:, :, 0] - noise(0)).max() < 3  # neither clipped to white nor cut to a few greys
    assert len(np.unique(pixels)) > 150


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_thirty_two_bit_is_scaled_by_its_own_range(tmp_path: Path, dtype: type) -> None:
    pixels = read_image(save((noise(0).astype(dtype) - 100) * 1000, tmp_path / "x.tif"))
    assert np.abs(pixels[:, :, 0] - noise(0)).max() < 3


def test_a_few_burnt_out_pixels_do_not_set_the_range(tmp_path: Path) -> None:
    deep = np.tile(np.arange(200, dtype=np.uint16), (100, 1))
    deep[0, :5] = 65535
    assert np.median(read_image(save(deep, tmp_path / "x.png"))) > 100


def test_constant_deep_images_are_black(tmp_path: Path) -> None:
    assert not read_image(save(np.full((8, 8), 700, np.uint16), tmp_path / "x.png")).any()


def test_images_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = read_image(save(np.rot90(noise(0)), tmp_path / "x.png", exif=exif))
    np.testing.assert_array_equal(pixels[:, :, 0], noise(0))


def test_resizing_is_pillows_bilinear() -> None:
    resized = resize_image(noise(0)[:, :, None], (9, 31))
    reference = Image.fromarray(noise(0)).resize((31, 9), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(resized[:, :, 0], np.asarray(reference))
    deep = resize_image(noise(0)[:, :, None].astype(np.float32), (9, 31))
    assert deep.dtype == np.uint8
    assert np.abs(deep.astype(int) - resized).max() <= 1


def png_with(tmp_path: Path, width: int, height: int) -> bytes:
    """A PNG whose header claims another size, with a valid checksum."""
    import struct
    import zlib

    data = bytearray(save(noise(0), tmp_path / "small.png").read_bytes())
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def test_bad_files_are_named(tmp_path: Path) -> None:
    whole = {extension: save(noise(0), tmp_path / f"whole.{extension}").read_bytes() for extension in ("png", "jpg")}
    pages = [Image.fromarray(noise(0)), Image.fromarray(noise(1))]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    bad = {
        "zero.png": (b"", "empty"),
        "text.png": (b"this is text, not an image", "no PNG, JPEG, TIFF, BMP or DICOM"),
        "half.png": (whole["png"][: len(whole["png"]) // 2], "truncated"),
        "half.jpg": (whole["jpg"][: len(whole["jpg"]) // 2], "truncated"),
        "flipped.png": (whole["png"][:60] + b"\xff\xff" + whole["png"][62:], "damaged"),
        "bomb.png": (png_with(tmp_path, 100_000, 100_000), "bomb"),
        "large.png": (png_with(tmp_path, 10_000, 10_000), "bomb"),
        "pages.tif": ((tmp_path / "pages.tif").read_bytes(), "2 pages"),
        "text.dcm": (b"this is text, not an image", "no readable DICOM"),
    }
    for name, (content, reason) in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=reason) as caught:
            read_image(tmp_path / name)
        assert name in str(caught.value)
    with pytest.raises(DataError, match=r"absent\.png: No such file"):
        read_image(tmp_path / "absent.png")


def test_not_a_number_is_refused(tmp_path: Path) -> None:
    pixels = noise(0).astype(np.float32)
    pixels[3, 3] = np.nan
    with pytest.raises(DataError, match="NaN"):
        read_image(save(pixels, tmp_path / "x.tif"))


def write_dicom(path: Path, stored: np.ndarray, **elements: object) -> Path:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, "1.2.3"
    dataset.Rows, dataset.Columns = stored.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.PatientName = "Secret^Person"
    dataset.PixelData = stored.astype("<u2").tobytes()
    for name, value in elements.items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


def test_dicom_is_rescaled_and_windowed(tmp_path: Path) -> None:
    stored = np.tile(np.arange(0, 4000, 100, dtype=np.uint16), (20, 1))
    path = write_dicom(
        tmp_path / "x.dcm",
        stored,
        RescaleSlope=2,
        RescaleIntercept=-1000,
        WindowCenter=[1000, 5],
        WindowWidth=[2001, 9],
        PixelSpacing=[0.2, 0.1],
    )
    expected = np.clip((stored.astype(float) * 2 - 1000 - 999.5) / 2000 + 0.5, 0, 1) * 255
    np.testing.assert_allclose(read_image(path)[:, :, 0], expected, atol=1e-3)
    assert read_spacing(path) == (0.2, 0.1)


def test_monochrome1_is_inverted(tmp_path: Path) -> None:
    stored = noise(0).astype(np.uint16) * 16
    plain = read_image(write_dicom(tmp_path / "a.dcm", stored))
    inverted = read_image(write_dicom(tmp_path / "b", stored, PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_allclose(inverted, 255 - plain, atol=1e-4)


def test_spacing_is_none_where_no_one_states_it(tmp_path: Path) -> None:
    stored = noise(0).astype(np.uint16)
    assert read_spacing(save(noise(0), tmp_path / "x.png", dpi=(300, 300))) is None
    assert read_spacing(write_dicom(tmp_path / "a.dcm", stored)) is None
    assert read_spacing(write_dicom(tmp_path / "b.dcm", stored, PixelSpacing=[0, 0])) is None
    assert read_spacing(write_dicom(tmp_path / "c.dcm", stored, ImagerPixelSpacing=[0.3, 0.3])) == (0.3, 0.3)


def test_dicom_errors_hold_no_patient_data(tmp_path: Path) -> None:
    stored = noise(0).astype(np.uint16)
    cut = write_dicom(tmp_path / "cut.dcm", stored)
    cut.write_bytes(cut.read_bytes()[:-200])
    coded = write_dicom(tmp_path / "coded.dcm", stored)
    dataset = pydicom.dcmread(coded)
    dataset.file_meta.TransferSyntaxUID = JPEGLSLossless
    dataset.PixelData = pydicom.encaps.encapsulate([b"nothing that decodes"])
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(coded)
    for path, reason in ((cut, "damaged or truncated"), (coded, r"JPEG-LS.*pip install")):
        with pytest.raises(DataError, match=reason) as caught:
            read_image(path)
        assert "Secret" not in str(caught.value)
        assert path.name in str(caught.value)
