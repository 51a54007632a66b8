"""Hostile files: each function writes one into a folder and returns an action of a user that opens it."""

import gc
import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save

from pdrunet_jax import config
from pdrunet_jax.config import DataConfig
from pdrunet_jax.data.dataset import open_dataset
from pdrunet_jax.data.images import read_image
from pdrunet_jax.data.importers.labelme import ImportLabelme, import_labelme
from pdrunet_jax.evaluate.report.page import write_report
from pdrunet_jax.model.load import load_model
from pdrunet_jax.predict.inference import segment
from pdrunet_jax.runtime.checkpoint import Checkpoints
from pdrunet_jax.runtime.digest import DIGEST
from pdrunet_jax.runtime.malloc import trim_malloc
from pdrunet_jax.train.tracking import MetricsLog
from tests.support.small_data import write_dicom

Action = Callable[[], object]
DEEP = 200_000


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.canary}'",)


def picture(path: Path, number: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((16, 16), np.uint8)
    pixels[4:12, 4:12] = 255
    pixels[0, 0] = number
    Image.fromarray(pixels).save(path)
    return path


def dataset(folder: Path) -> Path:
    for number in range(4):
        picture(folder / f"images/p{number}.png", number)
        picture(folder / f"masks/p{number}.png")
    return folder


def opened(root: Path) -> Action:
    return lambda: open_dataset(DataConfig(root=str(root), size=(16,), threads=1))


def manifest(folder: Path, image: str, mask: str) -> Action:
    root = dataset(folder / "data")
    (root / "manifest.csv").write_text(f"image,mask\n{image},{mask}\n")
    return opened(root)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IEND", b"")


def pickled_pth(folder: Path, canary: Path) -> Action:
    import torch

    torch.save({"weight": Payload(canary)}, folder / "w.pth")
    return lambda: load_model(folder / "w.pth")


def bare_pickle(folder: Path, canary: Path) -> Action:
    (folder / "w.pt").write_bytes(pickle.dumps(Payload(canary)))
    return lambda: load_model(folder / "w.pt")


def zip_slip_pth(folder: Path, canary: Path) -> Action:
    with zipfile.ZipFile(folder / "w.pth", "w") as file:
        file.writestr(f"../{canary.name}", "slipped out")
        file.writestr("archive/data.pkl", pickle.dumps(Payload(canary)))
        file.writestr("archive/version", "3\n")
    return lambda: load_model(folder / "w.pth")


def object_npz(folder: Path, canary: Path) -> Action:
    np.savez(folder / "w.npz", weight=np.array([Payload(canary)], dtype=object))
    return lambda: load_model(folder / "w.npz")


def object_npy_as_image(folder: Path, canary: Path) -> Action:
    root = dataset(folder / "data")
    np.save(folder / "x.npy", np.array([Payload(canary)], dtype=object))
    shutil.copy(folder / "x.npy", root / "images" / "p0.png")
    return opened(root)


def pixel_bomb(folder: Path, canary: Path) -> Action:
    root = dataset(folder / "data")
    row = zlib.compress(bytes(60_001)) * 10
    (root / "images/p0.png").write_bytes(png(60_000, 60_000, chunk(b"IDAT", row)))
    return opened(root)


def text_bomb(folder: Path, canary: Path) -> Action:
    root = dataset(folder / "data")
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(500 << 20), 9))
    (root / "images/p0.png").write_bytes(png(16, 16, bomb, chunk(b"IDAT", zlib.compress(bytes(17 * 16)))))
    return opened(root)


def truncated_dicom(folder: Path, canary: Path) -> Action:
    root = dataset(folder / "data")
    element = struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OW", 0, 0xFFFFFFF0)  # claims four gigabytes of pixels
    (root / "images/p0.png").write_bytes(bytes(128) + b"DICM" + element + bytes(64))
    return opened(root)


def dicom_bomb(folder: Path, syntax: str, frame: bytes) -> Action:
    """A DICOM file whose header states 16x16 pixels, whatever the compressed frame holds."""
    import pydicom

    path = write_dicom(folder / "x.dcm", np.zeros((16, 16), np.uint16))
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
    dataset.PixelData = pydicom.encaps.encapsulate([frame])
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(path)
    return lambda: bounded(lambda: read_image(path))


def huge(format: str, side: int, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("L", (side, side)).save(file, format=format, **options)
    return file.getvalue()


def rle_bomb(folder: Path, canary: Path) -> Action:
    return dicom_bomb(
        folder, "1.2.840.10008.1.2.5", struct.pack("<16I", 1, 64, *[0] * 14) + bytes([129, 0]) * 2_000_000
    )


def deflated_dicom(folder: Path, canary: Path) -> Action:
    """The transfer syntax comes after a long element."""
    import pydicom

    path = write_dicom(folder / "x.dcm", np.zeros((16, 16), np.uint16))
    meta = pydicom.dcmread(path).file_meta
    meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    head = pydicom.filebase.DicomBytesIO()
    head.is_little_endian, head.is_implicit_VR = True, False
    pydicom.filewriter.write_file_meta_info(head, meta, enforce_standard=False)
    long = struct.pack("<HH2sHI", 0x0002, 0x0001, b"OB", 0, 6000) + bytes(6000)
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = deflate.compress(struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OW", 0, 300 << 20) + bytes(300 << 20))
    path.write_bytes(bytes(128) + b"DICM" + long + head.getvalue() + bomb + deflate.flush())
    return lambda: bounded(lambda: read_image(path))


def expanded_pth(folder: Path, canary: Path) -> Action:
    import torch

    torch.save({"final_conv.weight": torch.zeros(1).expand(60 << 20)}, folder / "w.pth")
    return lambda: bounded(lambda: load_model(folder / "w.pth"))


def inflated_pth(folder: Path, canary: Path) -> Action:
    import torch

    file = io.BytesIO()
    torch.save({"final_conv.weight": torch.zeros(60 << 20)}, file)
    with zipfile.ZipFile(file) as plain, zipfile.ZipFile(folder / "w.pth", "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    return lambda: bounded(lambda: load_model(folder / "w.pth"))


def bounded(action: Action) -> object:
    """Run `action`, which may not take 100 MiB of memory, even for a moment."""
    gc.collect()
    trim_malloc()  # memory that making the file has left would hide what `action` takes
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = memory("VmRSS")
    try:
        return action()
    finally:
        assert memory("VmHWM") - before < 100 << 10


def memory(kind: str) -> int:
    """KiB of this process."""
    return int(Path("/proc/self/status").read_text().split(f"{kind}:")[1].split()[0])


def labelme(folder: Path, **changes: Any) -> Action:
    source = folder / "labelme"
    picture(source / "a.png")
    points = [[2, 2], [12, 2], [12, 12]]
    content = {"version": "5.0", "imagePath": "a.png", "imageData": None, "imageHeight": 16, "imageWidth": 16}
    content["shapes"] = [{"label": "bone", "points": points, "shape_type": "polygon"}]
    (source / "a.json").write_text(json.dumps(content | changes))
    return lambda: import_labelme(ImportLabelme(source, folder / "target"))


def nested_labelme(folder: Path, canary: Path) -> Action:
    source = folder / "labelme"
    source.mkdir()
    (source / "a.json").write_text('{"shapes": ' + "[" * DEEP + "]" * DEEP + "}")
    return lambda: import_labelme(ImportLabelme(source, folder / "target"))


def embedded_bomb(folder: Path, canary: Path) -> Action:
    import base64

    data = base64.b64encode(png(60_000, 60_000, chunk(b"IDAT", zlib.compress(bytes(1000))))).decode()
    return labelme(folder, imagePath="gone.png", imageData=data)


def nested_toml(folder: Path, canary: Path) -> Action:
    (folder / "c.toml").write_text("a = " + "[" * DEEP + "]" * DEEP)
    return lambda: config.load(folder / "c.toml")


def binary_toml(folder: Path, canary: Path) -> Action:
    (folder / "c.toml").write_bytes(bytes(range(256)))
    return lambda: config.load(folder / "c.toml")


def nested_dataset_toml(folder: Path, canary: Path) -> Action:
    root = dataset(folder / "data")
    (root / "dataset.toml").write_text("classes = " + "[" * DEEP + "]" * DEEP)
    return opened(root)


def safetensors(folder: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Action:
    size = struct.pack("<Q", len(header) if length is None else length)
    (folder / "w.safetensors").write_bytes(size + header + data)
    return lambda: load_model(folder / "w.safetensors")


def lying_sizes(folder: Path, canary: Path) -> Action:
    entry = {"final_conv.weight": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
    return safetensors(folder, json.dumps(entry).encode(), bytes(64))


def huge_header(folder: Path, canary: Path) -> Action:
    return safetensors(folder, b"{}", length=1 << 62)


def nested_header(folder: Path, canary: Path) -> Action:
    metadata = {"__metadata__": {"pdrunet": "[" * DEEP + "]" * DEEP}}
    return safetensors(folder, json.dumps(metadata).encode())


def changed_weights(run: Path, folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Action:
    arrays = load_file(run / "best.safetensors")
    change(arrays)
    (folder / "w.safetensors").write_bytes(save(arrays))
    return lambda: load_model(folder / "w.safetensors")


def nan_weights(run: Path, folder: Path) -> Action:
    return changed_weights(run, folder, lambda arrays: arrays["final_conv.bias"].fill(np.nan))


def negative_variance(run: Path, folder: Path) -> Action:
    def change(arrays: dict[str, np.ndarray]) -> None:
        next(array for name, array in arrays.items() if name.endswith("running_var")).fill(-1.0)

    return changed_weights(run, folder, change)


def checkpoint_bomb(run: Path, folder: Path) -> Action:
    Checkpoints(folder / "run/checkpoints", 1, 1).save(3, {"params": {"x": np.zeros(80 << 20, np.float32)}}, {})
    return lambda: bounded(lambda: load_model(folder / "run", which="latest"))


def wrong_shapes(run: Path, folder: Path) -> Action:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[next(name for name in arrays if name.endswith("first.weight"))] = np.zeros((1, 2, 3), np.float32)

    return changed_weights(run, folder, change)


def weights_and_more(run: Path, folder: Path) -> Action:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays["../../escape"] = np.zeros(3, np.float32)

    return changed_weights(run, folder, change)


def copied_run(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder / "run"))


def odd_configuration(run: Path, folder: Path) -> Action:
    run = copied_run(run, folder)
    run.joinpath("config.toml").write_text("[model]\nfilters = 1000000000\n")
    return lambda: load_model(run, which="latest")


def digest_of_elsewhere(run: Path, folder: Path, name: str) -> Action:
    run = copied_run(run, folder)
    for checkpoint in (run / "checkpoints").iterdir():
        text = f"{'0' * 64}  {name}\n"
        guard = hashlib.sha256(text.encode()).hexdigest()
        (checkpoint / DIGEST).write_text(f"{text}# sha256 of the lines above: {guard}\n")
    return lambda: Checkpoints(run / "checkpoints", 1, 1).restore({})


def linked_checkpoint(run: Path, folder: Path, outside: Path) -> Action:
    """The target of a link must not be deleted with the checkpoint."""
    run = copied_run(run, folder)
    for checkpoint in (run / "checkpoints").iterdir():
        shutil.rmtree(checkpoint)
        checkpoint.symlink_to(outside)
    return lambda: Checkpoints(run / "checkpoints", 1, 1).restore({})


def predicted(folder: Path, data: bytes, run: Path) -> Action:
    (folder / "x.png").write_bytes(data)
    model = load_model(run)
    return lambda: segment(model, folder / "x.png")


def half_png(run: Path, folder: Path) -> Action:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)).save(file, format="PNG")
    return predicted(folder, file.getvalue()[:500], run)


def svg(run: Path, folder: Path) -> Action:
    text = '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><svg xmlns="http://www.w3.org/2000/svg">&a;</svg>'
    return predicted(folder, text.encode(), run)


def nested_metrics(run: Path, folder: Path) -> Path:
    run = copied_run(run, folder)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "x": ' + "[" * DEEP + "]" * DEEP + "}\n")
    MetricsLog(run / "metrics.jsonl").truncate_after(10**9)
    write_report(run)
    return run
