"""No file of a run, its scores or its masks contains secrets of the environment or patient data of DICOM files."""

import csv
import gzip
import io
import json
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from tests.support.live import Place
from tests.support.tiny import run_command

SECRETS = {
    "WANDB_API_KEY": "canary0wandb" + "a" * 28,
    "AWS_SECRET_ACCESS_KEY": "canary0aws",
    "DATABASE_PASSWORD": "canary0password",
    "GITHUB_TOKEN": "canary0token",
}
PATIENT = {
    "PatientName": "Canary1^Patient",
    "PatientID": "canary1id",
    "PatientBirthDate": "19010203",
    "InstitutionName": "Canary1 Hospital",
    "StudyDescription": "canary1 study",
    "AccessionNumber": "canary1accession",
}
CANARIES = [value.encode() for value in (*SECRETS.values(), *PATIENT.values())]


def write_dicom(path: Path, pixels: np.ndarray) -> None:
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    image = FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
    for name, value in PATIENT.items():
        setattr(image, name, value)
    image.Rows, image.Columns = pixels.shape
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 12, 11, 0
    image.PixelData = pixels.astype("<u2").tobytes()
    image.save_as(path, enforce_file_format=True)


def radiographs(root: Path) -> Path:
    rows = []
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 1000, (32, 32))
        pixels[8:20, 4 + number : 20] += 2500
        write_dicom(root / f"images/{number}.dcm", pixels)
        mask = ((pixels > 1500) * 255).astype(np.uint8)
        Image.fromarray(mask).save(root / f"masks/{number}.png")
        split = "val" if number == 6 else "test" if number == 7 else "train"
        rows.append([f"images/{number}.dcm", f"masks/{number}.png", f"p{number}", split])
    with (root / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "mask", "patient", "split"], *rows])
    return root


def unpacked(data: bytes) -> Iterator[bytes]:
    """Yield a file's bytes and their unpacked contents: PNG text and pixels, gzip, zip, zlib."""
    yield data
    if data.startswith(b"\x89PNG"):
        image = Image.open(io.BytesIO(data))
        image.load()
        yield repr(image.info).encode()
        yield image.tobytes()
    if data.startswith(b"\x1f\x8b"):
        yield gzip.decompress(data)
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            for name in file.namelist():
                yield file.read(name)
    if data[:1] == b"\x78":
        yield zlib.decompress(data)


def leaks(folder: Path) -> list[str]:
    return [
        f"{path.relative_to(folder)}: {canary!r}"
        for path in sorted(folder.rglob("*"))
        for data in ([str(path).encode(), *unpacked(path.read_bytes())] if path.is_file() else [])
        for canary in CANARIES
        if canary.lower() in data.lower()
    ]


def test_no_secret_and_no_patient_is_in_anything_that_is_written(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    data = radiographs(place.path / "radiographs")
    assert leaks(data)  # the search works
    run = place.path / "private"
    options = ("--data.root", str(data), "--data.phantoms", "0", "--train.steps", "6", "--train.eval-every", "3")
    options += ("--train.samples", "1", "--tracking.wandb", "offline", "--optim.ema", "0.5")
    environment = {**SECRETS, "JAX_COMPILATION_CACHE_DIR": str(place.path / "private-cache"), "HOME": str(place.path)}
    trained = place.train(*options, workdir=run, **environment)
    assert trained.returncode == 0, trained.stderr

    for name, value in {**place.environment, **environment}.items():
        monkeypatch.setenv(name, value)
    everything = ("--probability", "--npz", "--contours", "--labelme", "--nrrd", "--nifti")
    commands = [
        run_command("evaluate", "--weights", run, "--data.root", data, "--output", "scores", cwd=place.path),
        run_command("predict", data / "images", "--weights", run, "--output", "masks", *everything, cwd=place.path),
    ]
    for done in commands:
        assert done.returncode == 0, done.stderr
    for said in (trained, *commands):
        assert not [canary for canary in CANARIES if canary.lower() in (said.stdout + said.stderr).lower().encode()]
    for folder in (run, place.path / "scores", place.path / "masks", place.path / "private-cache"):
        assert len([path for path in folder.rglob("*") if path.is_file()]) > 3
        assert leaks(folder) == []
    for checkpoint in (run / "checkpoints").iterdir():  # in a format that only Orbax reads; numbers only
        with ocp.PyTreeCheckpointer() as checkpointer:
            state = checkpointer.restore(checkpoint / "state")
        assert set(state) <= {"params", "stats", "opt_state", "ema", "ema_stats", "step", "diverged"}
        assert json.loads((checkpoint / "meta" / "metadata").read_text())["step"] == int(checkpoint.name)
