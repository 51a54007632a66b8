"""`python -m pdrunet_jax.data` as a user types it."""

import csv
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from small_data import config

from pdrunet_jax.data.dataset import open_dataset

Folder = Callable[..., Path]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pdrunet_jax.data", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_check_reports_what_is_there(folder: Folder) -> None:
    result = run("check", folder(6), "--classes", "bone", "255")
    assert result.returncode == 0, result.stderr
    for words in ("6, 24 to 24 pixels wide", "6 L", "bone", "patients  6", "in val"):
        assert words in result.stdout


def test_check_of_a_bad_folder_says_everything_and_exits_with_2(folder: Folder) -> None:
    root = folder(4)
    (root / "masks" / "x000.png").unlink()
    (root / "images" / "x001.png").write_bytes(b"")
    result = run("check", root)
    assert result.returncode == 2
    assert "images/x000.png" in result.stderr
    assert "images/x001.png" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("columns", [None, "image,mask,note"])
def test_split_writes_the_split_that_training_uses(folder: Folder, columns: str | None) -> None:
    root = folder(8)
    if columns:
        rows = [f"./images/x{i:03}.png,masks/x{i:03}.png,n{i}" for i in reversed(range(8))]
        (root / "manifest.csv").write_text(columns + "\n" + "\n".join(rows) + "\n")
    before = {sample.id: sample.split for sample in open_dataset(config(root)).samples}
    assert run("split", root).returncode == 0
    with (root / "manifest.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert {row["image"].removeprefix("./"): row["split"] for row in written} == before
    if columns:
        assert [row["note"] for row in written] == [f"n{i}" for i in reversed(range(8))]
    assert {sample.id: sample.split for sample in open_dataset(config(root, split_seed=5)).samples} == before
    assert [path.name for path in root.iterdir() if path.name.startswith(".")] == []
    again = run("split", root)
    assert again.returncode == 2
    assert "has a split" in again.stderr


def test_phantom_draws_a_dataset_that_checks(tmp_path: Path) -> None:
    assert run("phantom", tmp_path / "p", "--count", "4", "--size", "64").returncode == 0
    assert run("check", tmp_path / "p").returncode == 0
    assert run("phantom", tmp_path / "p").returncode == 2
