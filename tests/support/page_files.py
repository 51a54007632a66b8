"""Image files that readers get wrong: PNG in every mode, JPEG with EXIF, DICOM with windows and codecs."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from pdrunet_jax.data.phantoms.phantom import draw

_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_ORIENTATION = 274
_WINDOW = {"WindowCenter": 2000, "WindowWidth": 3000}


def write_page_files(folder: Path) -> list[Path]:
    """Write a file of each kind, of 150 x 96 pixels or turned; returns them in order."""
    folder.mkdir()
    grey = draw(1, size=150).image[:, :96]
    deep = grey.astype(np.uint16) * 16 + np.random.default_rng(0).integers(0, 16, grey.shape, dtype=np.uint16)
    _write_pngs(folder, grey, deep)
    _write_jpegs(folder, grey)
    _write_dicoms(folder, grey, deep)
    return sorted(folder.iterdir())


def _rgb(grey: np.ndarray) -> np.ndarray:
    return np.stack([grey, np.roll(grey, 3, axis=0), 255 - grey], axis=-1)


def _write_pngs(folder: Path, grey: np.ndarray, deep: np.ndarray) -> None:
    rgb = _rgb(grey)
    alpha = (np.indices(grey.shape).sum(axis=0) % 256).astype(np.uint8)
    hot = deep.copy()
    hot[3, 5] = 65535
    images = {
        "bits": Image.fromarray(grey > 120),
        "deep": Image.fromarray(deep),
        "deep_hot_pixel": Image.fromarray(hot),
        "grey_alpha": Image.fromarray(np.dstack([grey, alpha])),
        "palette": Image.fromarray(rgb).quantize(37),
        "rgba": Image.fromarray(np.dstack([rgb, alpha])),
    }
    for name, image in images.items():
        image.save(folder / f"{name}.png")
    exif = Image.Exif()
    exif[_ORIENTATION] = 6
    Image.fromarray(grey).save(folder / "turned.png", exif=exif)
    gamma = _chunk(b"gAMA", struct.pack(">I", 100_000))
    contents = {
        "gamma": _png(grey, 8, 0, gamma),
        "transparent_grey": _png(grey, 8, 0, _chunk(b"tRNS", struct.pack(">H", 20))),
        "srgb": _png(rgb, 8, 2, _chunk(b"sRGB", b"\0") + gamma),
        "two_bits": _png(grey >> 6, 2, 0),
        "interlaced": _png(grey, 8, 0, interlaced=True),
        "interlaced_deep": _png(deep, 16, 0, interlaced=True),
        "interlaced_four_bits": _png(grey >> 4, 4, 0, interlaced=True),
    }
    for name, content in contents.items():
        (folder / f"{name}.png").write_bytes(content)


def _write_jpegs(folder: Path, grey: np.ndarray) -> None:
    exif = Image.Exif()
    exif[_ORIENTATION] = 5
    Image.fromarray(_rgb(grey)).save(folder / "turned.jpg", exif=exif, quality=90)
    Image.fromarray(_rgb(grey)).save(folder / "progressive.jpg", progressive=True, subsampling=2)
    Image.fromarray(grey).save(folder / "grey.jpg")


def _write_dicoms(folder: Path, grey: np.ndarray, deep: np.ndarray) -> None:
    from pydicom import uid

    signed = (deep.astype(np.int32) - 2000).astype(np.int16)
    padded = deep.copy()
    padded[:20] = 0
    inverted = {"PhotometricInterpretation": "MONOCHROME1"}
    _dicom(folder / "window.dcm", deep, PixelSpacing=[0.2, 0.3], **_WINDOW)
    _dicom(folder / "implicit.dcm", deep, uid.ImplicitVRLittleEndian, **inverted, **_WINDOW)
    _dicom(folder / "range.dcm", deep, ImagerPixelSpacing=[0.14, 0.14])
    _dicom(folder / "sigmoid.dcm", deep, VOILUTFunction="SIGMOID", **_WINDOW)
    _dicom(folder / "padding.dcm", padded, PixelPaddingValue=0, **inverted, **_WINDOW)
    _dicom(folder / "signed.dcm", signed, RescaleSlope=2.5, RescaleIntercept=-100, WindowCenter=0, WindowWidth=6000)
    _dicom(folder / "eight_bits.dcm", grey)
    _dicom(folder / "run_lengths.dcm", deep, uid.RLELossless, **_WINDOW)
    _dicom(folder / "jpeg2000.dcm", deep, uid.JPEG2000Lossless, **_WINDOW)


def _dicom(path: Path, pixels: np.ndarray, syntax: str = "", **elements: object) -> None:
    from pydicom import dcmwrite, uid
    from pydicom.dataset import FileDataset, FileMetaDataset

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = uid.UID(syntax or uid.ExplicitVRLittleEndian)
    if compressed := meta.TransferSyntaxUID.is_compressed:
        meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian  # until it is compressed
    meta.MediaStorageSOPClassUID = uid.DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = uid.generate_uid(entropy_srcs=[path.name])
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    dataset.Rows, dataset.Columns = pixels.shape
    bits = 8 * pixels.itemsize
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    for name, value in elements.items():
        setattr(dataset, name, value)
    dataset.PixelData = pixels.tobytes()
    dataset["PixelData"].VR = "OB" if bits == 8 else "OW"
    if compressed:
        dataset.compress(syntax, generate_instance_uid=False)
    dcmwrite(path, dataset, enforce_file_format=True)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png(pixels: np.ndarray, bits: int, colour: int, extra: bytes = b"", *, interlaced: bool = False) -> bytes:
    """A PNG in a mode that Pillow does not write."""
    passes = [pixels[top::down, left::across] for left, top, across, down in _ADAM7] if interlaced else [pixels]
    rows = io.BytesIO()
    for part in passes:
        for row in part if part.size else ():
            spread = (row[:, None] >> np.arange(bits - 1, -1, -1) & 1).astype(np.uint8) if bits < 8 else None
            packed = np.packbits(spread).tobytes() if spread is not None else row.astype(f">u{bits // 8}").tobytes()
            rows.write(b"\0" + packed)
    header = struct.pack(">II5B", pixels.shape[1], pixels.shape[0], bits, colour, 0, 0, int(interlaced))
    body = _chunk(b"IHDR", header) + extra + _chunk(b"IDAT", zlib.compress(rows.getvalue())) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body
