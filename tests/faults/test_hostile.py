"""Hostile files: none is executed or writes outside its target, and each is refused with one message."""

import csv
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pdrunet_jax.evaluate import __main__ as evaluate
from pdrunet_jax.evaluate.scores import read_csv
from pdrunet_jax.model.files import read_weights, write_safetensors
from pdrunet_jax.model.load import MODEL_OPTIONS
from pdrunet_jax.runtime.errors import RunError, UserError
from pdrunet_jax.runtime.run_folder import read_entries
from tests.support import hostile_files as hostile
from tests.support.live import Place, record
from tests.support.tiny import run_command

FILES: dict[str, Callable[[Path, Path], hostile.Action]] = {
    "a .pth that runs code": hostile.pickled_pth,
    "a bare pickle that runs code": hostile.bare_pickle,
    "a .pth that slips out of its archive": hostile.zip_slip_pth,
    "an .npz with objects as weights": hostile.object_npz,
    "an array of objects as image": hostile.object_npy_as_image,
    "a manifest with ..": lambda f, c: hostile.manifest(f, "../../secret.png", "masks/p0.png"),
    "a manifest with .. further in": lambda f, c: hostile.manifest(f, "images/../../secret.png", "masks/p0.png"),
    "a manifest with an absolute mask": lambda f, c: hostile.manifest(f, "images/p0.png", "/etc/passwd"),
    "a manifest with NUL": lambda f, c: hostile.manifest(f, "images/p0\0.png", "masks/p0.png"),
    "a LabelMe imagePath with ..": lambda f, c: hostile.labelme(f, imagePath="../../secret.png"),
    "an absolute LabelMe imagePath": lambda f, c: hostile.labelme(f, imagePath="/etc/passwd"),
    "a LabelMe file nested deeply": hostile.nested_labelme,
    "a bomb inside a LabelMe file": hostile.embedded_bomb,
    "an image of 3.6 billion pixels": hostile.pixel_bomb,
    "an image with half a gigabyte of text": hostile.text_bomb,
    "a DICOM file that claims four gigabytes": hostile.truncated_dicom,
    "a JPEG 2000 of 81 million pixels in a small DICOM image": lambda f, c: hostile.dicom_bomb(
        f, "1.2.840.10008.1.2.4.90", hostile.huge("JPEG2000", 9_000, no_jp2=True)
    ),
    "the same in JPEG 2000's own file format": lambda f, c: hostile.dicom_bomb(
        f, "1.2.840.10008.1.2.4.90", hostile.huge("JPEG2000", 9_000)
    ),
    "a JPEG of 88 million pixels in a small DICOM image": lambda f, c: hostile.dicom_bomb(
        f, "1.2.840.10008.1.2.4.50", hostile.huge("JPEG", 9_400)
    ),
    "an RLE frame of 256 million pixels": hostile.rle_bomb,
    "a deflated DICOM file": hostile.deflated_dicom,
    "a .pth that expands an array": hostile.expanded_pth,
    "a .pth that is compressed": hostile.inflated_pth,
    "a configuration nested deeply": hostile.nested_toml,
    "a configuration that is no text": hostile.binary_toml,
    "a dataset.toml nested deeply": hostile.nested_dataset_toml,
    "weights that lie about their sizes": hostile.lying_sizes,
    "weights with an endless header": hostile.huge_header,
    "weights with options nested deeply": hostile.nested_header,
}
OF_A_RUN: dict[str, Callable[[Path, Path], hostile.Action]] = {
    "weights that are NaN": hostile.nan_weights,
    "weights with negative variances": hostile.negative_variance,
    "a checkpoint of zeros without end": hostile.checkpoint_bomb,
    "weights of wrong shapes": hostile.wrong_shapes,
    "weights with a name that is a path": hostile.weights_and_more,
    "a configuration of a run with a billion filters": hostile.odd_configuration,
    "a checkpoint whose digest names a device": lambda r, f: hostile.digest_of_elsewhere(r, f, "/dev/zero"),
    "a checkpoint whose digest leads out of it": lambda r, f: hostile.digest_of_elsewhere(r, f, "../../config.toml"),
    "a checkpoint that is a link": lambda r, f: hostile.linked_checkpoint(r, f, f.parent / "outside"),
    "half an image": hostile.half_png,
    "an SVG that reads a file": hostile.svg,
}


def tree(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(action: hostile.Action, tmp_path: Path, outside: dict[Path, bytes]) -> str:
    began = time.monotonic()
    with pytest.raises((UserError, RunError)) as caught:
        action()
    message = str(caught.value)
    assert 10 < len(message) < 2000
    assert time.monotonic() - began < 20
    assert tree(tmp_path / "outside") == outside
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "outside"]
    assert not (tmp_path / "folder" / "target").exists()
    return message


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, dict[Path, bytes]]:
    (tmp_path / "folder").mkdir()
    (tmp_path / "outside").mkdir()
    hostile.picture(tmp_path / "outside" / "secret.png")
    return tmp_path / "folder", tree(tmp_path / "outside")


@pytest.mark.parametrize("kind", FILES)
def test_a_hostile_file_is_refused(folders: tuple[Path, dict[Path, bytes]], tmp_path: Path, kind: str) -> None:
    folder, outside = folders
    canary = tmp_path / "outside" / "executed"
    assert_refused(FILES[kind](folder, canary), tmp_path, outside)
    assert not canary.exists()


@pytest.mark.parametrize("kind", OF_A_RUN)
def test_a_hostile_part_of_a_run_is_refused(
    place: Place, folders: tuple[Path, dict[Path, bytes]], tmp_path: Path, kind: str
) -> None:
    folder, outside = folders
    assert_refused(OF_A_RUN[kind](place.undisturbed, folder), tmp_path, outside)
    record("hostile files", kinds=len(FILES) + len(OF_A_RUN), refused=len(FILES) + len(OF_A_RUN))


def test_a_hostile_line_of_metrics_is_passed_over(place: Place, tmp_path: Path) -> None:
    run = hostile.nested_metrics(place.undisturbed, tmp_path)
    assert len(read_entries(run / "metrics.jsonl")) == len(read_entries(place.undisturbed / "metrics.jsonl"))


def without_class_names(run: Path, path: Path) -> Path:
    """The best weights of a run as a file that fits classes of any name."""
    file = read_weights(run / "best.safetensors")
    write_safetensors(
        path, file.arrays, {key: item for key, item in file.options.items() if key in (*MODEL_OPTIONS, "size")}
    )
    return path


def test_names_neither_drive_a_terminal_nor_run_in_a_spreadsheet(place: Place, tmp_path: Path) -> None:
    root = hostile.dataset(tmp_path / "data")
    (root / "dataset.toml").write_text('[classes]\n"=1+1" = 255\n')
    weights = without_class_names(place.undisturbed, tmp_path / "w.safetensors")
    rows = ["image,mask,patient"]
    for number, patient in enumerate(("=cmd|' /C calc'!A0", "'=x", "-1", "@a\x1b]0;title\x07")):
        image = f"images/={number}\x1b[2J.png"
        (root / f"images/p{number}.png").rename(root / image)
        rows.append(f"{image},masks/p{number}.png,{patient}")
    (root / "manifest.csv").write_text("\n".join(rows))
    done = run_command(
        "evaluate", "--weights", weights, "--data.root", root, "--split", "all", "--output", "o", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    table = tmp_path / "o/per_image.csv"
    with table.open(newline="") as file:
        cells = {cell for row in csv.reader(file) for cell in row[:3]}
    assert {"'=cmd|' /C calc'!A0", "''=x", "-1", "'@a\x1b]0;title\x07", "'=1+1"} <= cells
    read = read_csv(table)
    assert {row.patient for row in read} == {"=cmd|' /C calc'!A0", "'=x", "-1", "@a\x1b]0;title\x07"}
    assert {row.class_name for row in read} == {"=1+1"}

    predicted = run_command("predict", root / "images", "--weights", place.undisturbed, "--output", "p", cwd=tmp_path)
    assert predicted.returncode == 0, predicted.stderr
    assert r"=0\x1b[2J.png" in predicted.stdout
    assert "\x1b" not in predicted.stdout + predicted.stderr
    assert all(line.startswith("'=") for line in (tmp_path / "p/areas.csv").read_text().splitlines()[1:])


def test_names_in_a_report_are_text_not_markup(place: Place, tmp_path: Path) -> None:
    root = hostile.dataset(tmp_path / "data")
    evil = "<img src=x onerror=alert(1)>"
    (root / "dataset.toml").write_text(f'name = "{evil}"\n[classes]\n"{evil}" = 255\n')
    for kind in ("images", "masks"):
        (root / kind / "p0.png").rename(root / kind / "p0<script>alert(2)<!--.png")
    run = hostile.copied_run(place.undisturbed, tmp_path)
    hostile.shutil.rmtree(run / "evaluation")
    without_class_names(run, run / "best.safetensors")
    evaluate.main(
        ["--weights", str(run), "--data.root", str(root), "--split", "all", "--output", str(run / "evaluation/test")]
    )
    page = hostile.write_report(run).read_text()
    assert "&lt;img src=x" in page
    assert "&lt;script&gt;" in page
    assert evil not in page
    assert "<script>alert(2)" not in page
