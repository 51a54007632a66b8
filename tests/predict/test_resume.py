"""A run that ends early, by whatever cause, goes on where it stopped: nothing is lost, done twice, or mixed."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from pdrunet_jax.data import overlay
from pdrunet_jax.predict.__main__ import main
from pdrunet_jax.predict.outputs import RECORD_KEY
from pdrunet_jax.runtime.errors import UserError
from tests.support import ROOT
from tests.support.tiny import bright_square, brightness_model, run_command, save_image, save_model

COUNT = 40


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder `in` of images, every tenth of them broken, and weights."""
    for number in range(COUNT):
        path = tmp_path / f"in/{number % 3}/{number:02}.png"
        save_image(path, bright_square(24, 32, 4, number % 16, 12))
        if number % 10 == 0:
            path.write_bytes(b"broken")
    save_model(brightness_model(), tmp_path / "w.safetensors", class_names=["bone"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(*options: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "pdrunet_jax.predict", "in", "--weights", "w.safetensors", "--output", "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def predict_in(*options: str) -> int | None:
    return main(["in", "--weights", "w.safetensors", "--output", "out", "--no-overlay", *options])


def lines_until(process: "subprocess.Popen[str]", count: int) -> list[str]:
    assert process.stdout is not None
    return [process.stdout.readline() for _ in range(count)]


def rows(path: Path) -> list[str]:
    with path.open(newline="") as file:
        return [row["image"] for row in csv.DictReader(file)]


def test_a_killed_run_goes_on_without_doing_an_image_twice(place):
    process = start("--labelme")
    first = lines_until(process, 12)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*_mask.png")}
    assert 12 <= len(before) < COUNT

    done = run_command("predict", "in", "--weights", "w.safetensors", "--output", "out", "--labelme", cwd=place)
    assert done.returncode == 1
    assert f"4 of {COUNT} images could not be read" in done.stderr
    assert f"{COUNT - 4} of {COUNT} images segmented" in done.stdout
    masks = sorted(Path("out").rglob("*_mask.png"))
    assert len(masks) == COUNT - 4
    again = [path for path, changed in before.items() if path.stat().st_mtime_ns != changed]
    assert len(again) <= 1  # killed between its mask and its LabelMe file
    named = rows(Path("out/areas.csv"))
    assert len(named) == len(set(named)) == COUNT - 4
    assert not {line.split()[1] for line in first} & {line.split()[1] for line in done.stdout.splitlines()[1:-1]}
    assert len(list(Path("out").rglob("*.tmp"))) <= 1  # what was being written when the process was killed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_stop_finishes_its_image_and_leaves_with_75(place, number):
    process = start()
    lines_until(process, 3)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75
    assert f"stopped by {number.name}" in errors
    assert "Traceback" not in errors
    done = len(list(Path("out").rglob("*_mask.png")))
    assert 3 <= done < COUNT
    assert len(rows(Path("out/areas.csv"))) == len(list(Path("out").rglob("*_overlay.png"))) == done


def test_shards_write_to_one_folder_and_one_more_run_joins_their_areas(place):
    for number in (1, 2, 3):
        with pytest.raises(Exception, match="could not be read"):
            predict_in("--shard", f"{number}/3")
    shares = [rows(Path(f"out/areas_{number}of3.csv")) for number in (1, 2, 3)]
    named = [name for share in shares for name in share]
    assert len(named) == len(set(named)) == COUNT - 4
    changed = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*_mask.png")}
    with pytest.raises(Exception, match="could not be read"):
        predict_in()
    assert changed == {path: path.stat().st_mtime_ns for path in Path("out").rglob("*_mask.png")}
    assert sorted(rows(Path("out/areas.csv"))) == sorted(named)


@pytest.fixture
def one(place):
    """The same with one sound image, which is done."""
    for path in Path("in").rglob("*.png"):
        if path.name != "11.png":
            path.unlink()
    predict_in()
    return Path("out/11_mask.png")


def test_other_options_are_refused_with_the_difference(one):
    with pytest.raises(UserError, match=r"11_mask\.png: threshold was 0\.5, is 0\.3(?s:.*)--overwrite"):
        predict_in("--threshold", "0.3")
    with pytest.raises(UserError, match=r"largest was 0, is 1"):
        predict_in("--largest", "1")
    assert predict_in("--threshold", "0.3", "--overwrite") is None
    assert predict_in("--threshold", "0.3") is None


def test_other_weights_are_refused(one):
    model = brightness_model()
    model.final_conv.bias.set_value(model.final_conv.bias[...] + 1)
    save_model(model, Path("w.safetensors"), class_names=["bone"])
    with pytest.raises(UserError, match="other weights"):
        predict_in()


def test_a_changed_image_is_refused_and_a_copied_one_is_not(one):
    image = Path("in/2/11.png")
    os.utime(image, (time.time() + 10, time.time() + 10))
    changed = one.stat().st_mtime_ns
    predict_in()
    assert one.stat().st_mtime_ns == changed
    save_image(image, bright_square(24, 32, 0, 0, 5))
    with pytest.raises(UserError, match="the image has changed"):
        predict_in()
    predict_in("--overwrite")
    assert np.asarray(Image.open(one)).sum() == 25
    assert Path("out/areas.csv").read_text().splitlines()[1:] == ["11.png,bone,25,"]


def test_a_changed_image_of_the_same_size_and_time_is_noticed(place):
    image = save_image(Path("one/x.bmp"), bright_square(24, 32, 4, 0, 12))
    command = ["one", "--weights", "w.safetensors", "--output", "out"]
    main(command)
    state = image.stat()
    save_image(image, bright_square(24, 32, 4, 9, 7))
    os.utime(image, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert image.stat().st_size == state.st_size
    with pytest.raises(UserError, match="the image has changed"):
        main(command)


def test_a_mask_of_somebody_else_is_not_replaced(one):
    Image.fromarray(np.ones((24, 32), np.uint8)).save(one)
    with pytest.raises(UserError, match="not written by this command"):
        predict_in()
    assert np.asarray(Image.open(one)).all()


def test_a_labelme_file_of_somebody_else_is_not_replaced(one):
    Path("out/11.json").write_text("drawn by hand")
    with pytest.raises(UserError, match=r"11\.json: not written by this command"):
        predict_in("--labelme")
    assert Path("out/11.json").read_text() == "drawn by hand"


def test_a_corrected_labelme_file_stays(one):
    predict_in("--labelme")
    Path("out/11.json").write_text("corrected by hand")
    predict_in("--labelme")
    assert Path("out/11.json").read_text() == "corrected by hand"


def test_an_output_that_is_asked_for_later_is_added(one):
    predict_in("--npz")
    predict_in("--contours")
    assert {path.name for path in Path("out").iterdir()} == {
        "11_mask.png",
        "11_contours.csv",
        "11_probability.npz",
        "areas.csv",
    }


def test_corrected_files_stay_while_what_is_missing_is_written(one):
    predict_in("--overlay", "--labelme", "--contours")
    corrected = {name: Path("out") / name for name in ("11.json", "11_contours.csv")}
    for path in corrected.values():
        path.write_text("corrected by hand")
    Path("out/11_overlay.png").unlink()
    assert predict_in("--overlay", "--labelme", "--contours", "--npz") is None
    assert Path("out/11_overlay.png").exists()
    assert Path("out/11_probability.npz").exists()
    assert {path.read_text() for path in corrected.values()} == {"corrected by hand"}
    predict_in("--threshold", "0.3", "--overwrite")
    assert {path.read_text() for path in corrected.values()} == {"corrected by hand"}
    assert not Path("out/11_probability.npz").exists()


def test_a_file_that_predict_did_not_write_is_never_replaced(one):
    shutil.rmtree("out")
    options = ("--overlay", "--contours", "--npz", "--nifti", "--probability")
    for name in ("_overlay.png", "_contours.csv", "_probability.npz", "_mask.nii.gz", "_probability.png", "_mask.png"):
        other = Path(f"out/11{name}")
        other.parent.mkdir(exist_ok=True)
        other.write_text("work of a person")
        with pytest.raises(UserError, match=re.escape(f"{other}: not written by this command")):
            predict_in(*options)
        assert [path.name for path in Path("out").iterdir()] == [other.name]
        assert other.read_text() == "work of a person"
        other.unlink()
    table = Path("out/areas.csv")
    table.write_text("image,reader,grade\n11.png,me,3\n")
    with pytest.raises(UserError, match=r"areas\.csv was not written by this command"):
        predict_in()
    assert table.read_text().endswith("me,3\n")
    assert predict_in("--overwrite") is None


def test_a_corrected_mask_is_not_replaced_when_another_output_is_asked_for(one):
    with Image.open(one) as image:
        corrected, text = np.array(image), PngImagePlugin.PngInfo()
        text.add_text(RECORD_KEY, image.info[RECORD_KEY])
    corrected[:3] = 1
    overlay.index_mask(corrected, 1).save(one, pnginfo=text)
    with pytest.raises(UserError, match=r"11_mask\.png: modified since"):
        predict_in("--npz")
    np.testing.assert_array_equal(np.asarray(Image.open(one)), corrected)
    assert predict_in() is None


def test_rows_of_a_person_are_kept_in_a_copy_of_the_table(one, capsys):
    table = Path("out/areas.csv")
    corrected = table.read_text().replace("144", "150") + "other.png,bone,7,\n"
    table.write_text(corrected)
    predict_in()
    assert Path("out/areas_earlier1.csv").read_text() == corrected
    assert "areas_earlier1.csv" in capsys.readouterr().out
    predict_in("--npz")
    assert not Path("out/areas_earlier2.csv").exists()


def test_results_of_an_earlier_version_are_complete(one):
    with Image.open(one) as image:
        record, text = json.loads(image.info[RECORD_KEY]), PngImagePlugin.PngInfo()
        record["files"] = list(record["files"])
        del record["mask"]
        text.add_text(RECORD_KEY, json.dumps(record))
        image.save(one, pnginfo=text)
    changed = one.stat().st_mtime_ns
    predict_in()
    assert one.stat().st_mtime_ns == changed


def test_what_does_not_fit_any_more_is_removed(one):
    predict_in("--npz")
    predict_in("--threshold", "0.3", "--overwrite")
    assert not Path("out/11_probability.npz").exists()


def test_a_torn_line_of_areas_is_mended(one):
    table = Path("out/areas.csv")
    whole = table.read_text()
    table.write_text(whole[:-5])
    predict_in()
    assert table.read_text() == whole
    table.write_text(whole + whole[-9:])
    predict_in()
    assert table.read_text() == whole


def test_two_runs_at_once_are_refused(place):
    process = start()
    lines_until(process, 1)
    process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(UserError, match="another process"):
            predict_in()
    finally:
        process.kill()
        process.communicate()
