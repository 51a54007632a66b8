"""Read COUNT damaged files of each kind, made from good ones, and report: `python -m tests.support.fuzz COUNT SEED`.

A process of its own, so that its memory can be limited and a hang cannot stop the tests.
"""

import io
import json
import resource
import signal
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom import uid

from pdrunet_jax.data.dataset import inspect_dataset
from pdrunet_jax.data.images import decode_image
from pdrunet_jax.data.importers.labelme import ImportLabelme, import_labelme
from pdrunet_jax.data.masks import codes_to_classes, declare, decode_codes
from pdrunet_jax.runtime.errors import UserError
from tests.support.labelme_files import annotate, box, png, shape
from tests.support.seen_data import deep_png, palette
from tests.support.small_data import SIZE, config, noise, save, shapes, write_dicom

MOST_BYTES = 1 << 30
MOST_SECONDS = 20
"""For one file, on a machine that has other things to do."""

CODINGS = (
    declare({}),
    declare({"a": 1, "b": 2}),
    declare({"bone": 255}, 127, 100),
    declare({"a": "#ff0000", "b": "#00ff00"}),
)
NUMBERS = st.sampled_from([0, 1, 2, 255, 256, 65535, 65536, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1])


def encoded(image: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def images() -> list[bytes]:
    """A file of each kind that is read."""
    grey, colour = noise(0), np.stack([noise(i) for i in (1, 2, 3)], axis=-1)
    deep = grey.astype(np.uint16) * 200
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb = Image.fromarray(colour)
    return [
        encoded(grey, "PNG"),
        encoded(shapes(0), "PNG"),
        encoded(deep, "PNG"),
        encoded(rgb.convert("RGBA"), "PNG"),
        encoded(palette(shapes(0), [0, 0, 0, 9, 9, 9, 50, 60, 70], bytes([0, 100, 255])), "PNG"),
        encoded(rgb.convert("1"), "PNG", exif=exif),
        deep_png(np.stack([deep] * 3, axis=-1)),  # refused
        encoded(grey, "JPEG"),
        encoded(rgb, "JPEG", exif=exif, progressive=True),
        encoded(rgb.convert("CMYK"), "JPEG"),
        encoded(grey, "TIFF"),
        encoded(deep, "TIFF", compression="tiff_lzw"),
        encoded(grey / np.float32(3), "TIFF"),
        encoded(rgb, "TIFF", compression="tiff_adobe_deflate"),
        encoded(rgb, "TIFF", compression="jpeg"),
        encoded(rgb.convert("1"), "TIFF", compression="group4"),
        encoded(grey, "BMP"),
        encoded(rgb, "BMP"),
        encoded(rgb.convert("P"), "BMP"),
        encoded(grey, "GIF"),
        encoded(rgb, "GIF", save_all=True, append_images=[rgb.rotate(90)]),  # refused
        encoded(rgb, "WEBP", lossless=True),
        encoded(grey, "WEBP", exif=exif),
        encoded(grey, "JPEG2000"),
        encoded(deep, "JPEG2000"),
        encoded(rgb, "JPEG2000", no_jp2=True),
    ]


def dicoms(folder: Path) -> list[bytes]:
    stored = np.tile(noise(0).astype(np.uint16) * 16, (2, 2))  # JPEG 2000 does not come smaller
    plain = dict(RescaleSlope="1.5", RescaleIntercept="-100", WindowCenter=[600, 9], WindowWidth=[1200, 9])
    paths = [
        write_dicom(folder / "a.dcm", stored),
        write_dicom(folder / "b.dcm", stored, **plain, PixelSpacing=[0.1, 0.1], VOILUTFunction="SIGMOID"),
        write_dicom(folder / "c.dcm", stored, PhotometricInterpretation="MONOCHROME1", NumberOfFrames=1),
        write_dicom(
            folder / "d.dcm", stored, PixelPaddingValue=0, PixelPaddingRangeLimit=99, VOILUTSequence=[table(8)]
        ),
        write_dicom(folder / "e.dcm", stored, ModalityLUTSequence=[table(16)], WindowCenter=9, WindowWidth=9),
    ]
    files = [path.read_bytes() for path in paths]
    files.append(files[0][132:])  # no preamble
    for syntax in (uid.JPEG2000Lossless, uid.RLELossless, uid.DeflatedExplicitVRLittleEndian):
        dataset = pydicom.dcmread(paths[2])
        if syntax.is_compressed and syntax.is_encapsulated:
            dataset.compress(syntax)
        else:
            dataset.file_meta.TransferSyntaxUID = syntax
        file = io.BytesIO()
        dataset.save_as(file, enforce_file_format=True)
        files.append(file.getvalue())
    return files


def table(bits: int) -> pydicom.Dataset:
    """A DICOM look-up table of 256 entries."""
    item = pydicom.Dataset()
    for keyword, value in (("LUTDescriptor", [256, 0, bits]), ("LUTData", list(range(256)))):
        item.add_new(keyword, "US", value)
    return item


@st.composite
def damaged(draw: st.DrawFn, good: list[bytes]) -> bytes:
    """One of `good` with bits turned, numbers replaced, parts cut, doubled, or taken from another."""
    data = bytearray(draw(st.sampled_from(good)))
    for _ in range(draw(st.integers(1, 3))):
        if not data:
            break
        near = draw(st.booleans())  # headers are where the harm is done
        at = draw(st.integers(0, min(len(data), 160 if near else len(data)) - 1))
        what = draw(st.integers(0, 6))
        if what == 0:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif what == 1:
            data[at] = draw(st.integers(0, 255))
        elif what == 2:
            width, order = draw(st.sampled_from([("H", 2), ("I", 4)])), draw(st.sampled_from("<>"))
            number = draw(NUMBERS) & ((1 << 8 * width[1]) - 1)
            data[at : at + width[1]] = struct.pack(order + width[0], number)
        elif what == 3:
            del data[at:]
        elif what == 4:
            del data[at : at + draw(st.integers(1, 64))]
        elif what == 5:
            data[at:at] = data[at : at + draw(st.integers(1, 64))]
        else:
            other = draw(st.sampled_from(good))
            start = draw(st.integers(0, len(other) - 1))
            data[at:at] = other[start : start + draw(st.integers(1, 200))]
    return checked(bytes(data)) if draw(st.booleans()) else bytes(data)


def checked(data: bytes) -> bytes:
    """A PNG with the checksums that its damaged chunks ought to have, so that a reader goes on; others as they are."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    result, at = bytearray(data), 8
    while at + 12 <= len(result):
        (length,) = struct.unpack_from(">I", result, at)
        end = at + 8 + length
        if end + 4 > len(result):
            break
        struct.pack_into(">I", result, end, zlib.crc32(result[at + 4 : end]))
        at = end + 4
    return bytes(result)


def texts(*good: str) -> st.SearchStrategy[bytes]:
    """Damaged texts, or such with words and numbers that readers trip over."""
    odd = ["NaN", "-1", "1e999", "null", '"', "{", "[[", "\\ud800", "9" * 5000, "../..", "\0", "[" * 3000, "true", ","]

    @st.composite
    def words(draw: st.DrawFn) -> bytes:
        text = draw(st.sampled_from(good))
        for _ in range(draw(st.integers(1, 3))):
            at = draw(st.integers(0, len(text)))
            text = text[:at] + draw(st.sampled_from(odd)) + text[at + draw(st.integers(0, 8)) :]
        return text.encode("utf-8", "surrogatepass")

    return words() | damaged([text.encode() for text in good])


def read_as_image(data: bytes, name: str) -> None:
    for channels in (1, 3):
        pixels, _ = decode_image(data, name, channels)
        assert pixels.ndim == 3
        assert pixels.shape[2] == channels
        assert pixels.dtype == np.uint8 or (pixels.dtype == np.float32 and 0 <= pixels.min() <= pixels.max() <= 255)


def read_as_mask(data: bytes, name: str) -> None:
    refusals = []
    for coding in CODINGS:
        try:
            codes = decode_codes(data, name, coding)
            assert codes.ndim == 2
            assert codes_to_classes(codes, coding, name).shape == codes.shape
        except UserError as error:
            refusals.append(error)
    if len(refusals) == len(CODINGS):
        raise refusals[0]


Kinds = dict[str, tuple[st.SearchStrategy[bytes], Callable[[bytes], object]]]
"""For each kind of file the damaged ones, and what reads them."""


def kinds(folder: Path) -> Kinds:
    """Images, masks and the files of a dataset folder."""
    root, source = folder / "dataset", folder / "annotations"
    for index in range(3):
        save(noise(index), root / f"imagesTr/x{index}_0000.png")
        save(shapes(index), root / f"labelsTr/x{index}.png")
    save(noise(0), source / "a.png")
    whole = [
        shape("femur", box(1, 1, 5, 5)),
        shape("femur", [[1, 1], [9, 9]], "rectangle"),
        shape("tibia", [[9, 9], [12, 9]], "circle"),
        shape("tibia", [[1, 1], [3, 3]], "mask", mask=png(np.ones((3, 3), np.uint8))),
        shape("ruler", [[1, 1], [3, 3]], "line"),
    ]
    labelme = annotate(folder / "good.json", "a.png", whole, SIZE, imageData=png(noise(1))).read_text()
    old = annotate(folder / "old.json", "a.png", [shape("femur", box(1, 1, 5, 5), None)], version="3.16.7").read_text()
    rows = "".join(
        f"imagesTr/x{i}_0000.png,labelsTr/x{i}.png,p{i},{s}\n" for i, s in enumerate(("train", "val", "test"))
    )
    nnunet = json.dumps({"labels": {"background": 0, "femur": 1, "tibia": [2]}, "name": "legs"})
    toml = 'name = "legs"\nclasses = { femur = 1, tibia = [2] }\nignore = 127\nspacing = [0.1, 2]\nlicence = "CC0"\n'
    colours = 'classes = { background = "#000000", bone = ["#010101", "#020202"] }\nspacing = 0.1\n'

    def described(name: str, beside: str = "") -> Callable[[bytes], object]:
        def read(data: bytes) -> object:
            if beside:
                (root / "dataset.toml").write_text(beside)
            (root / name).write_bytes(data)
            try:
                return inspect_dataset(config(root))
            finally:
                (root / name).unlink()
                (root / "dataset.toml").unlink(missing_ok=True)

        return read

    def imported(data: bytes) -> None:
        (source / "a.json").write_bytes(data)
        with tempfile.TemporaryDirectory(dir=folder) as target:
            import_labelme(ImportLabelme(source, Path(target) / "x"))

    coded = images()
    return {
        "image": (damaged(coded), lambda data: read_as_image(data, "x.png")),
        "mask": (damaged(coded), lambda data: read_as_mask(data, "x.png")),
        "dicom": (damaged(dicoms(folder)), lambda data: read_as_image(data, "x.dcm")),
        "labelme": (texts(labelme, old), imported),
        "manifest.csv": (
            texts("image,mask,patient,split\n" + rows, "mask,note,image\nlabelsTr/x0.png,,imagesTr/x0_0000.png\n"),
            described("manifest.csv", toml),
        ),
        "dataset.toml": (texts(toml, colours), described("dataset.toml")),
        "dataset.json": (texts(nnunet), described("dataset.json")),
    }


def attempt(files: st.SearchStrategy[bytes], read: Callable[[bytes], object], count: int, start: int) -> dict[str, int]:
    """How many of `count` of `files` could be read, and how many were refused."""
    outcomes = {"read": 0, "refused": 0}

    @seed(start)
    @settings(
        max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=False
    )
    @given(files)
    def one(data: bytes) -> None:
        signal.alarm(MOST_SECONDS)  # its default action ends the process
        try:
            read(data)
            outcomes["read"] += 1
        except UserError as error:
            outcomes["refused"] += 1
            if "Memory" in str(error):
                raise AssertionError(str(error)) from error
        finally:
            signal.alarm(0)

    one()
    return outcomes


def run(count: int, start: int, kinds: Callable[[Path], Kinds] = kinds, most: int = MOST_BYTES) -> None:
    """Read `count` damaged files of each kind; only `UserError` may come of it, and no want of memory behind it."""
    resource.setrlimit(resource.RLIMIT_AS, (4 * MOST_BYTES, 4 * MOST_BYTES))  # room for libraries; see below
    with tempfile.TemporaryDirectory() as name:
        for kind, (files, read) in kinds(Path(name)).items():
            print(kind, attempt(files, read, count, start), flush=True)
    # Not getrusage: Linux hands the peak of the process that started this one on to it.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    print(f"memory {peak >> 20} MiB")
    assert peak < most


if __name__ == "__main__":
    run(int(sys.argv[1]), int(sys.argv[2]))
