"""A hundred images with forty things wrong: one run of `data check` reports them all."""

import csv
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from PIL import Image

from tests.support.seen_data import deep_png
from tests.support.small_data import SIZE, noise, save, shapes, write_dicom

IMAGES = 100
Row = dict[str, str]
Plant = Callable[[Path, Row], tuple[str, str]]
"""Spoils one image or its row; returns which file and what the report must say of it."""


def column(name: str, value: str, words: str) -> Plant:
    def plant(root: Path, row: Row) -> tuple[str, str]:
        row[name] = value
        return value, words

    return plant


def content(kind: str, extension: str, write: Callable[[Path], object], words: str) -> Plant:
    """A file of another content in the place of the image or mask."""

    def plant(root: Path, row: Row) -> tuple[str, str]:
        (root / row[kind]).unlink()
        row[kind] = str(Path(row[kind]).with_suffix(extension))
        write(root / row[kind])
        return row[kind], words

    return plant


def resized(mask: np.ndarray, words: str) -> Plant:
    def plant(root: Path, row: Row) -> tuple[str, str]:
        save(mask, root / row["mask"])
        return row["image"], f"24x20 pixels, but its mask {row['mask']} {words}"

    return plant


def cut(write: Callable[[Path], object], keep: float = 0.6) -> Callable[[Path], object]:
    def written(path: Path) -> None:
        write(path)
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * keep)])

    return written


def picture(pixels: np.ndarray, **options: object) -> Callable[[Path], object]:
    return lambda path: save(pixels, path, **options)


def bomb(path: Path) -> None:
    data = bytearray(save(noise(0), path).read_bytes())
    data[16:24] = struct.pack(">II", 100_000, 100_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(bytes(data))


def spoiled(path: Path) -> None:
    data = bytearray(save(noise(0), path).read_bytes())
    data[60:62] = b"\xff\xff"
    path.write_bytes(bytes(data))


def pages(path: Path) -> None:
    two = [Image.fromarray(noise(index)) for index in (0, 1)]
    two[0].save(path, save_all=True, append_images=two[1:])


def ppm(path: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(noise(0)).save(file, format="PPM")
    path.write_bytes(file.getvalue())


def without_pixels(path: Path) -> None:
    dataset = pydicom.dcmread(write_dicom(path, noise(0).astype(np.uint16)))
    del dataset.PixelData
    dataset.save_as(path)


def frames(path: Path) -> None:
    write_dicom(path, noise(0).astype(np.uint16), NumberOfFrames=2, PixelData=noise(0).astype("<u2").tobytes() * 2)


def nan(path: Path) -> None:
    save(np.where(noise(0) > 250, np.nan, 1).astype(np.float32), path)


def dicom(path: Path, **elements: object) -> Path:
    return write_dicom(path, noise(0).astype(np.uint16), **elements)


def deep(path: Path) -> None:
    path.write_bytes(deep_png(np.ones((*SIZE, 3))))


def coded(value: int, kind: type = np.uint8) -> np.ndarray:
    mask = shapes(0).astype(kind)
    mask[0, 0] = value
    return mask


PLANTED: list[Plant] = [
    column("image", "", "image path is missing"),
    column("mask", "", "mask path is missing"),
    column("image", "../outside.png", "image ../outside.png leads out of the dataset folder"),
    column("image", "images/../../x.png", "image images/../../x.png leads out"),
    column("mask", "..\\outside.png", "mask ..\\outside.png leads out"),
    column("mask", "/etc/hostname", "mask /etc/hostname is absolute"),
    column("mask", "C:\\masks\\1.png", "mask C:\\masks\\1.png is absolute"),
    column("image", "images/gone.png", "image images/gone.png does not exist"),
    column("mask", "masks/gone.png", "mask masks/gone.png does not exist"),
    column("image", "images/0099.png", "image images/0099.png is already listed in line"),
    column("split", "tset", 'split "tset" is not train, val or test'),
    column("patient", "", "the patient is missing"),
    column("patient", "p98", "patient p98 is in test and train"),
    content("image", ".png", picture(noise(97)), "identical pixels"),
    content("image", ".png", lambda path: path.write_bytes(b""), "the file is empty"),
    content("image", ".png", lambda path: path.write_text("no image"), "no PNG, JPEG, TIFF, BMP, GIF, WebP"),
    content("image", ".png", cut(picture(noise(0))), "damaged or truncated"),
    content("image", ".jpg", cut(picture(noise(0))), "damaged or truncated"),
    content("image", ".bmp", cut(picture(noise(0))), "damaged or truncated"),
    content("image", ".tif", cut(picture(noise(0)), 0.9), "damaged or truncated"),
    content("image", ".png", spoiled, "damaged or truncated"),
    content("image", ".png", bomb, "refused as a bomb"),
    content("image", ".png", ppm, "no PNG, JPEG, TIFF, BMP, GIF, WebP"),
    content("image", ".tif", pages, "2 pages"),
    content("image", ".tif", nan, "holds NaN"),
    content("image", ".dcm", lambda path: path.write_text("no image"), "or DICOM image"),
    content("image", ".dcm", cut(dicom), "damaged or truncated DICOM pixel data"),
    content("image", ".dcm", without_pixels, "a DICOM file without an image"),
    content("image", ".dcm", frames, "save it as one grey or 8-bit RGB image"),
    content("image", ".dcm", lambda path: dicom(path, Rows=60_000, Columns=60_000), "refused as a bomb"),
    content("mask", ".png", lambda path: path.write_bytes(b""), "the file is empty"),
    content("mask", ".png", cut(picture(shapes(0))), "damaged or truncated"),
    content("mask", ".png", bomb, "refused as a bomb"),
    content("mask", ".tif", pages, "2 pages"),
    content("mask", ".png", picture(coded(77)), "undeclared mask value 77"),
    content("mask", ".png", picture(coded(300, np.uint16)), "undeclared mask value 300"),
    content("mask", ".jpg", picture(shapes(0) * np.uint8(100)), "undeclared mask values"),
    content("mask", ".tif", picture(shapes(0) / np.float32(2)), "a mask of fractions"),
    content("mask", ".png", picture(np.stack([noise(i) for i in range(3)], axis=-1)), "undeclared mask values"),
    content("image", ".png", deep, "16 bits in each of several channels"),
    content("mask", ".png", deep, "16 bits in each of several channels"),
    resized(shapes(0)[:10], "has 24x10"),
    resized(shapes(0).T, "has 20x24"),
]


def test_every_one_of_forty_problems_is_said_in_one_run(run: Callable[..., Any], tmp_path: Path) -> None:
    root = tmp_path / "data"
    rows = []
    for index in range(IMAGES):
        row = {"image": f"images/{index:04}.png", "mask": f"masks/{index:04}.png", "patient": f"p{index}"}
        row["split"] = "test" if index >= IMAGES - 10 else "train"
        save(noise(index), root / row["image"])
        save(shapes(index), root / row["mask"])
        rows.append(row)
    (root / "dataset.toml").write_text("classes = { femur = 1, tibia = 2 }")
    expected = [plant(root, rows[2 * number]) for number, plant in enumerate(PLANTED)]
    with (root / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)

    result = run("check", root)
    assert result.returncode == 2
    head, *problems = result.stderr.split("\n  - ")
    missing = [
        (where, words) for where, words in expected if not any(where in line and words in line for line in problems)
    ]
    assert not missing, result.stderr
    assert len(expected) == len(problems) >= 40
    assert f": {len(expected)} problems:" in head
