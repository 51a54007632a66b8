"""Datasets in every form that people bring, each with its meaning."""

import csv
import io
import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from pdrunet_jax.data.importers.labelme import ImportLabelme, import_labelme
from pdrunet_jax.data.importers.mura import ImportMura, import_mura
from tests.support.labelme_files import annotate, box, shape
from tests.support.small_data import SIZE, noise, save, shapes, write_dicom

COUNT = 6
TWO = ("femur", "tibia")


@dataclass
class Seen:
    """The meaning of a dataset."""

    truth: dict[str, np.ndarray]
    """By image (the end of its id) the class indices, 255 where ignored."""
    classes: tuple[str, ...] = ("foreground",)
    options: list[str] = field(default_factory=list)
    """Options that the dataset needs."""


def palette(indices: np.ndarray, colours: list[int], alpha: bytes | None = None) -> Image.Image:
    """A palette image as a PNG reader sees it."""
    image = Image.new("P", indices.shape[::-1])
    image.putdata(indices.ravel().tolist())
    image.putpalette(colours)
    stream = io.BytesIO()
    image.save(stream, "PNG", **({} if alpha is None else {"transparency": alpha}))
    return Image.open(stream)


def deep_png(values: np.ndarray) -> bytes:
    """A PNG of 16 bits for each channel of (H, W, 2 to 4): Pillow cannot write one."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    kind = {2: 4, 3: 2, 4: 6}[values.shape[2]]
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, kind, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in values.astype(">u2"))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def flat(root: Path, mask: Callable[[int], np.ndarray | Image.Image], declared: str = "") -> None:
    """images/ and masks/, and a dataset.toml."""
    for index in range(COUNT):
        save(noise(index), root / f"images/x{index}.png")
        save(mask(index), root / f"masks/x{index}.png")
    if declared:
        (root / "dataset.toml").write_text(declared)


def truths(pattern: str, meaning: Callable[[int], np.ndarray]) -> dict[str, np.ndarray]:
    return {pattern.format(index): meaning(index) for index in range(COUNT)}


def binary(index: int) -> np.ndarray:
    return (shapes(index) > 0).astype(np.uint8)


def white(index: int) -> np.ndarray:
    return binary(index) * np.uint8(255)


def palette_indices(root: Path) -> Seen:
    flat(root, lambda i: palette(shapes(i), [0, 0, 0, 128, 0, 0, 0, 128, 0]), "classes = { femur = 1, tibia = 2 }")
    return Seen(truths("images/x{}.png", shapes), TWO)


def palette_with_soft_alpha(root: Path) -> Seen:
    def drawn(index: int) -> Image.Image:  # index 0 is the opaque red, later ones ever more transparent
        indices = np.where(shapes(index) > 0, 0, 218).astype(np.uint8)
        indices[0, :4] = [20, 80, 130, 200]  # of 255: 232, 162, 103 and 22
        return palette(indices, [200, 0, 0] * 219, bytes(max(0, 255 - value * 255 // 218) for value in range(219)))

    def meaning(index: int) -> np.ndarray:
        expected = binary(index)
        expected[0, :2] = 1
        return expected

    flat(root, drawn, "classes = { bone = 255 }\nthreshold = 128")
    return Seen(truths("images/x{}.png", meaning), ("bone",))


def zero_and_one(root: Path) -> Seen:
    flat(root, binary)
    return Seen(truths("images/x{}.png", binary))


def blue_background(root: Path) -> Seen:
    colours = np.array([[0, 0, 255], [0, 255, 0], [255, 0, 0]], np.uint8)
    flat(root, lambda i: colours[shapes(i)], 'classes = { femur = "#00ff00", tibia = "#ff0000" }')
    return Seen(truths("images/x{}.png", shapes), TWO)


def red_channel(root: Path) -> Seen:
    def drawn(index: int) -> np.ndarray:
        pixels = np.zeros((*SIZE, 4), np.uint8)
        pixels[:, :, 0], pixels[:, :, 3] = shapes(index), 255
        pixels[0, 0, 0] = 3
        return pixels

    def meaning(index: int) -> np.ndarray:
        expected = binary(index)
        expected[0, 0] = 1
        return expected

    flat(root, drawn)
    options = ["--data.classes", "nucleus", "1,2,3"]
    return Seen(truths("images/x{}.png", meaning), ("nucleus",), options)


def ignored_values(root: Path) -> Seen:
    flat(root, lambda i: np.array([0, 255, 127], np.uint8)[shapes(i)], "classes = { lung = 255 }\nignore = 127")
    return Seen(truths("images/x{}.png", lambda i: np.array([0, 1, 255], np.uint8)[shapes(i)]), ("lung",))


def soft_edges(root: Path) -> Seen:
    def drawn(index: int) -> np.ndarray:
        large = Image.fromarray(white(index)).resize((192, 160), Image.Resampling.BICUBIC)
        return np.asarray(large.rotate(10).resize(SIZE[::-1], Image.Resampling.BILINEAR))

    flat(root, drawn)
    options = ["--data.classes", "bone", "255", "--data.threshold", "128"]  # many of the few pixels are edges
    return Seen(truths("images/x{}.png", lambda i: (drawn(i) >= 128).astype(np.uint8)), ("bone",), options)


def split_folders(root: Path) -> Seen:
    splits = ("train", "train", "train", "val", "test", "test")
    for index, split in enumerate(splits):
        save(noise(index), root / split / f"images/{index}.png")
        save(white(index), root / split / f"masks/{index}.png")
    return Seen({f"{split}/images/{index}.png": binary(index) for index, split in enumerate(splits)})


def names_that_differ(root: Path) -> Seen:
    """Suffixes, other extensions, a sort order that misleads, and litter of operating systems."""
    for index, mask in enumerate(("b_mask", "a", "d_seg", "c", "zz", "e_label")):
        image = mask.split("_")[0]
        save(noise(index), root / f"images/{image}.{'tif' if index % 2 else 'png'}")
        save(white(index), root / f"masks/{mask}.{'bmp' if index % 3 else 'png'}")
    for junk in ("images/._a.png", "images/.DS_Store", "masks/.keep", "masks/__MACOSX/a.png", "images/Thumbs.db"):
        (root / junk).parent.mkdir(exist_ok=True)
        (root / junk).write_bytes(b"junk")
    return Seen(
        {f"images/{n}.{'tif' if i % 2 else 'png'}": binary(i) for i, n in enumerate(("b", "a", "d", "c", "zz", "e"))}
    )


def nnunet(root: Path) -> Seen:
    for index in range(COUNT):
        part = "Tr" if index < 4 else "Ts"
        save(noise(index), root / f"images{part}/leg_{index:03}_0000.png")
        save(np.array([0, 1, 2], np.uint8)[shapes(index)], root / f"labels{part}/leg_{index:03}.png")
    labels = {"background": 0, "femur": 1, "ignore": 2}
    (root / "dataset.json").write_text(json.dumps({"labels": labels, "file_ending": ".png", "numTraining": 4}))
    meaning = np.array([0, 1, 255], np.uint8)
    return Seen({f"leg_{index:03}_0000.png": meaning[shapes(index)] for index in range(COUNT)}, ("femur",))


def manifest_by_reference(root: Path) -> Seen:
    """Images elsewhere, a byte order mark, Windows' separators, columns of other people, patients and a split."""
    rows = [["image", "mask", "age", "patient", "split"]]
    for index in range(COUNT):
        image = save(noise(index), root.parent / f"archive/{index}.png")
        save(palette(shapes(index), [0, 0, 0, 255, 0, 0, 0, 0, 255]), root / f"drawn/{index}.png")
        split = ("train", "training", "validation")[index // 2]
        rows.append([str(image), f"drawn\\{index}.png", "61", f"p{index // 2}", split])
    with (root / "manifest.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows(rows)
    (root / "dataset.toml").write_text("classes = { bone = [1, 2] }\nspacing = 0.2\nname = 'archive'\nlicence = 'CC0'")
    return Seen(truths("archive/{}.png", binary), ("bone",))


def every_mode(root: Path) -> Seen:
    """Images of all modes and formats in one dataset, with patients in their names."""
    kinds = [("L", "png"), ("LA", "png"), ("RGB", "jpg"), ("RGBA", "png"), ("P", "bmp"), ("CMYK", "tif"), ("1", "png")]
    names = []
    for index, (mode, extension) in enumerate(kinds):
        names.append(f"leg{index}-{mode}.{extension}")
        save(Image.fromarray(noise(index)).convert(mode), root / "images" / names[-1])
    deep = noise(7).astype(np.uint16) * 16
    for name, pixels in (("leg8-I16.png", deep), ("leg9-F.tif", deep / np.float32(7)), ("leg10-I.tif", deep - 900)):
        names.append(name)
        save(pixels if name != "leg10-I.tif" else pixels.astype(np.int32), root / "images" / name)
    write_dicom(root / "images/leg12-dx.dcm", deep, PhotometricInterpretation="MONOCHROME1", PixelSpacing=[0.1, 0.1])
    names.append("leg12-dx.dcm")
    for index, name in enumerate(names):
        save(white(index), root / "masks" / f"{Path(name).stem}.png")
    options = ["--data.patient-regex", r"leg(\d+)-"]
    return Seen({f"images/{name}": binary(index) for index, name in enumerate(names)}, options=options)


def turned_by_exif(root: Path) -> Seen:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    for index in range(COUNT):
        save(np.rot90(noise(index)), root / f"images/{index}.png", exif=exif)
        save(np.rot90(white(index)), root / f"masks/{index}.png", exif=exif)
    return Seen(truths("images/{}.png", binary))


def labelme(root: Path) -> Seen:
    """Versions 3 and 5, imagePath with ../, a box around a polygon, embedded data of another contrast."""
    source = root.parent / "annotated"
    for index in range(COUNT):
        save(noise(index), source / f"images/{index}.png")
        row = 2 + index % 5
        polygons = [box(3, row, 9, row + 7), box(13, row, 19, row + 5)]
        kind = None if index % 2 else "polygon"
        drawn = [shape(label, points, kind) for label, points in zip(TWO, polygons, strict=True)]
        if index % 2 == 0:
            drawn.append(shape("femur", [[2.5, row - 0.5], [10.5, row + 8.5]], "rectangle"))
        annotate(
            source / f"json/{index}.json", f"../images/{index}.png", drawn, version="3.16.7" if index % 2 else "5.5.0"
        )
    import_labelme(ImportLabelme(source, root, classes={"femur": 1, "tibia": 2}))
    return Seen(truths("images/{}.png", shapes), TWO)


def mura(root: Path) -> Seen:
    """A tree like MURA's, with masks of MURA's names; its own train and valid are kept apart."""
    tree, masks, truth = root.parent / "MURA-v1.1", root.parent / "masks", {}
    for index in range(8):
        split = "valid" if index > 5 else "train"
        name = f"{split}/XR_HUMERUS/patient{index:05}/study1_positive/image1.png"
        mode = ("L", "RGB", "RGBA", "P")[index % 4]
        save(Image.fromarray(noise(index)).convert(mode), tree / name)
        save(white(index), masks / name)
        truth[name] = binary(index)
    import_mura(ImportMura(tree, root, masks, ("XR_HUMERUS",)))
    return Seen(truth)


def twins_and_empty_masks(root: Path) -> Seen:
    """One image twice, and a mask without a bone."""
    flat(root, lambda i: white(i) * np.uint8(i != 3))
    save(noise(0), root / "images/x1.png", compress_level=1)
    return Seen(truths("images/x{}.png", lambda i: binary(i) * np.uint8(i != 3)))


CASES: dict[str, Callable[[Path], Seen]] = {
    case.__name__: case
    for case in (
        palette_indices,
        palette_with_soft_alpha,
        zero_and_one,
        blue_background,
        red_channel,
        ignored_values,
        soft_edges,
        split_folders,
        names_that_differ,
        nnunet,
        manifest_by_reference,
        every_mode,
        turned_by_exif,
        labelme,
        mura,
        twins_and_empty_masks,
    )
}
