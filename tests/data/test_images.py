"""Images of every kind come out right, and bad ones as an error that names the file."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import JPEGLSLossless

from pdrunet_jax.data.images import decode_plain_png, read_image, read_spacing, resize_image
from pdrunet_jax.data.masks import declare, read_mask
from pdrunet_jax.runtime.errors import DataError
from tests.support.seen_data import deep_png
from tests.support.small_data import SIZE, noise, save, write_dicom

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


def test_plain_png_is_decoded_outside_of_pillow_to_the_same_pixels(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    for index, size in enumerate(((1, 1), (20, 24), (301, 257))):
        pixels = np.random.default_rng(index).integers(0, 256, size, dtype=np.uint8)
        plain = decode_plain_png(save(pixels, tmp_path / "x.png").read_bytes())
        assert plain is not None
        np.testing.assert_array_equal(plain, pixels)
        for other in (
            save(pixels, tmp_path / "turned.png", exif=exif),
            save(pixels.astype(np.uint16), tmp_path / "deep.png"),
            save(np.stack([pixels] * 3, axis=-1), tmp_path / "colour.png"),
            save(pixels, tmp_path / "x.bmp"),
        ):
            assert decode_plain_png(other.read_bytes()) is None
    whole = save(noise(0), tmp_path / "x.png").read_bytes()
    for damage in (whole[:-50], whole[:30], whole[:60] + b"\xff\xff" + whole[62:], b""):
        assert decode_plain_png(damage) is None  # so that the message comes from Pillow


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


def test_the_whole_range_of_deep_images_is_kept_unless_pixels_lie_far_off(tmp_path: Path) -> None:
    deep = np.linspace(1000, 2000, 20_000).astype(np.uint16).reshape(100, 200)
    deep[0, 0] = 4000  # 2 times the range of the others beyond it, and too rare for the percentiles
    pixels = read_image(save(deep, tmp_path / "x.png"))[:, :, 0]
    np.testing.assert_allclose(pixels, (deep - 1000.0) * (255 / 3000), atol=1e-3)
    deep[0, 0] = 60_000
    burnt = read_image(save(deep, tmp_path / "y.png"))[:, :, 0]
    assert np.median(burnt) == pytest.approx(127.5, abs=1)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_sixteen_bits_in_several_channels_are_refused(tmp_path: Path, channels: int) -> None:
    """Pillow keeps the upper 8 bits without a word: a radiograph of 12 bits would be left with 16 greys."""
    values = np.random.default_rng(0).integers(0, 4096, (*SIZE, channels))
    (tmp_path / "x.png").write_bytes(deep_png(values))
    refused = ["x.png"]
    for order in "<>" if channels > 2 else "":
        refused.append(f"x{ord(order)}.tif")
        (tmp_path / refused[-1]).write_bytes(colour_tiff(values, order))
    for name in refused:
        for read in (read_image, lambda path: read_mask(path, declare({"bone": 1}))):
            with pytest.raises(
                DataError, match=rf"{name}: 16 bits in each of several channels; save it as 16-bit grey"
            ):
                read(tmp_path / name)


def colour_tiff(values: np.ndarray, order: str) -> bytes:
    """A TIFF of 16 bits for each channel, which Pillow cannot write."""
    height, width, channels = values.shape
    pixels = values.astype(f"{order}u2").tobytes()
    tags = [(256, width), (257, height), (258, None), (259, 1), (262, 2), (273, 8), (277, channels), (278, height)]
    tags += [(279, len(pixels)), (284, 1)] + ([(338, 2)] if channels == 4 else [])
    start = 8 + len(pixels)
    beyond = start + 2 + 12 * len(tags) + 4
    table = struct.pack(f"{order}H", len(tags))
    for tag, value in tags:
        if value is None:
            table += struct.pack(f"{order}HHII", tag, 3, channels, beyond)
        else:
            table += struct.pack(f"{order}HHII", tag, 4, 1, value)
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, start)
    return head + pixels + table + struct.pack(f"{order}I{channels}H", 0, *[16] * channels)


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
        "text.png": (b"this is text, not an image", "no PNG, JPEG, TIFF, BMP, GIF"),
        "half.png": (whole["png"][: len(whole["png"]) // 2], "truncated"),
        "half.jpg": (whole["jpg"][: len(whole["jpg"]) // 2], "truncated"),
        "flipped.png": (whole["png"][:60] + b"\xff\xff" + whole["png"][62:], "damaged"),
        "bomb.png": (png_with(tmp_path, 100_000, 100_000), "bomb"),
        "large.png": (png_with(tmp_path, 10_000, 10_000), "bomb"),
        "pages.tif": ((tmp_path / "pages.tif").read_bytes(), "2 pages"),
        "text.dcm": (b"this is text, not an image", "WebP, JPEG 2000 or DICOM image"),
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


@pytest.mark.parametrize("function", ["SIGMOID", "LINEAR_EXACT"])
def test_the_other_window_functions_are_dicoms(tmp_path: Path, function: str) -> None:
    stored = np.tile(np.arange(0, 4000, 100, dtype=np.uint16), (20, 1))
    window = {"WindowCenter": 1500, "WindowWidth": 800, "VOILUTFunction": function}
    share = (stored - 1500.0) / 800
    expected = 255 / (1 + np.exp(-4 * share)) if function == "SIGMOID" else 255 * np.clip(share + 0.5, 0, 1)
    path = write_dicom(tmp_path / "x.dcm", stored, **window)
    np.testing.assert_allclose(read_image(path)[:, :, 0], expected, atol=1e-3)


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


@pytest.mark.parametrize(
    ("elements", "reason"),
    [
        ({"Rows": 60_000, "Columns": 60_000}, "refused as a bomb"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "PALETTE COLOR of shape"),
        ({"RescaleSlope": "1e308", "RescaleIntercept": "1e308"}, "exceed the range"),
    ],
)
def test_dicom_that_would_come_out_wrong_is_refused(tmp_path: Path, elements: dict[str, object], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        read_image(write_dicom(tmp_path / "x.dcm", noise(0).astype(np.uint16) + 60_000, **elements))


def test_deflated_dicom_is_refused_before_it_is_inflated(tmp_path: Path) -> None:
    dataset = pydicom.dcmread(write_dicom(tmp_path / "x.dcm", noise(0).astype(np.uint16)))
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    dataset.save_as(tmp_path / "x.dcm")
    with pytest.raises(DataError, match="deflated"):
        read_image(tmp_path / "x.dcm")


@pytest.mark.parametrize("syntax", ["JPEG2000Lossless", "RLELossless"])
def test_compressed_dicom_is_read_without_loss(tmp_path: Path, syntax: str) -> None:
    stored = np.tile(noise(0).astype(np.uint16) * 16, (2, 2))
    plain = read_image(write_dicom(tmp_path / "x.dcm", stored))
    dataset = pydicom.dcmread(tmp_path / "x.dcm")
    dataset.compress(getattr(pydicom.uid, syntax))
    dataset.save_as(tmp_path / "y.dcm")
    np.testing.assert_array_equal(read_image(tmp_path / "y.dcm"), plain)


def test_jpeg_lossless_dicom_is_read_without_loss(tmp_path: Path) -> None:
    gdcm = pytest.importorskip("gdcm", reason="python-gdcm decodes JPEG lossless")
    plain = write_dicom(tmp_path / "x.dcm", noise(0).astype(np.uint16) * 16)
    reader = gdcm.ImageReader()
    reader.SetFileName(str(plain))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(tmp_path / "y.dcm"))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    np.testing.assert_array_equal(read_image(tmp_path / "y.dcm"), read_image(plain))
