import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pdrunet_jax.data import overlay
from pdrunet_jax.predict.__main__ import main
from pdrunet_jax.predict.inputs import find_images, name_results, take_shard
from pdrunet_jax.runtime import cli
from pdrunet_jax.runtime.errors import UserError
from tests.support.small_data import write_dicom
from tests.support.tiny import bright_square, brightness_model, run_command, save_image, save_model

SQUARE = bright_square(40, 60, 12, 20, 15)


@pytest.fixture
def weights(tmp_path):
    return save_model(brightness_model(), tmp_path / "w.safetensors", class_names=["bone"])


def test_a_folder_gives_masks_and_overlays_and_names_the_broken_file(tmp_path, weights):
    save_image(tmp_path / "in/left/a.png", SQUARE)
    save_image(tmp_path / "in/right/a.png", SQUARE.T)
    (tmp_path / "in/broken.png").write_bytes(b"no image at all")
    (tmp_path / "in/._a.png").write_bytes(b"left behind by macOS")
    (tmp_path / "in/notes.txt").write_text("not an image")
    done = run_command("predict", "in", "--weights", weights, "--output", "out", "--probability", cwd=tmp_path)
    assert done.returncode == 1
    assert "1 of 3 images could not be read" in done.stderr
    assert "broken.png" in done.stderr
    assert "Traceback" not in done.stderr
    assert "RuntimeWarning" not in done.stderr
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    kinds = ("mask", "overlay", "probability")
    assert written == {"areas.csv"} | {f"{side}/a_{kind}.png" for side in ("left", "right") for kind in kinds}

    mask = Image.open(tmp_path / "out/left/a_mask.png")
    np.testing.assert_array_equal(np.asarray(mask), SQUARE > 128)
    np.testing.assert_array_equal(np.asarray(mask.convert("L")), np.where(SQUARE > 128, 255, 0))
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out/right/a_mask.png")), SQUARE.T > 128)
    probability = np.asarray(Image.open(tmp_path / "out/left/a_probability.png"))
    assert probability.dtype == np.uint16
    np.testing.assert_array_equal(probability > 32767, SQUARE > 128)
    drawn = np.asarray(Image.open(tmp_path / "out/left/a_overlay.png"))
    assert drawn.shape == (40, 60, 3)
    assert tuple(drawn[12, 20]) == overlay.COLOURS[0]
    assert tuple(drawn[0, 0]) == (20, 20, 20)


def test_several_classes_are_an_index_image_and_a_probability_each(tmp_path):
    weights = save_model(brightness_model(3), tmp_path / "w.safetensors", class_names=["femur", "tibia"])
    pixels = np.repeat([[20, 120, 230]], 30, axis=0).repeat(10, axis=1)
    save_image(tmp_path / "x.png", pixels)
    done = run_command(
        "predict", "x.png", "--weights", weights, "--output", "out", "--no-overlay", "--probability", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "areas.csv",
        "x_mask.png",
        "x_probability_femur.png",
        "x_probability_tibia.png",
    }
    mask = Image.open(tmp_path / "out/x_mask.png")
    np.testing.assert_array_equal(np.asarray(mask), np.repeat([[0, 1, 2]], 30, axis=0).repeat(10, axis=1))
    assert mask.convert("RGB").getpixel((25, 5)) == overlay.COLOURS[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.png"], "nowhere.png: no such file"),
        (["empty"], "empty: contains no image"),
        (["*.jpg"], "*.jpg"),
        (["x.png", "--threshold", "2"], "threshold 2"),
        (["x.png", "--size", "0"], "--size 0"),
        (["x.png", "--tile", "0"], "--tile 0"),
        (["x.png", "--shard", "4/3"], "--shard 4/3"),
        (["x.png", "--shard", "third"], "--shard third"),
        (["x.png", "--largest", "-1"], "--largest -1"),
        (["x.png", "--tolerance", "-1"], "--tolerance -1"),
        ([], "no input was given"),
    ],
)
def test_nothing_to_do_is_exit_code_two(tmp_path, weights, monkeypatch, capsys, arguments, words):
    (tmp_path / "empty").mkdir()
    save_image(tmp_path / "x.png", SQUARE)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: main([*arguments, "--weights", str(weights), "--output", "out"]))
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_globs_folders_and_files_give_each_image_once(tmp_path):
    for name in ("b/1.png", "b/c/2.tif", "b/3.JPG"):
        save_image(tmp_path / name, SQUARE)
    inputs = [str(tmp_path / "b/**/*.tif"), str(tmp_path / "b"), str(tmp_path / "b/1.png")]
    found = find_images(inputs, tmp_path / "out")
    assert sorted(path.name for path in found.images) == ["1.png", "2.tif", "3.JPG"]


def test_earlier_results_are_no_input(tmp_path):
    for name in ("x.png", "x_mask.png", "x_overlay.png", "x_probability_femur.png"):
        save_image(tmp_path / name, SQUARE)
    assert [path.name for path in find_images([str(tmp_path)], tmp_path).images] == ["x.png"]
    assert len(find_images([str(tmp_path)], tmp_path / "elsewhere").images) == 4


def test_links_unreadable_folders_and_dicom_files_are_found_as_in_datasets(tmp_path):
    save_image(tmp_path / "in/r0.png", SQUARE)
    save_image(tmp_path / "store/s0.png", SQUARE)
    write_dicom(tmp_path / "in/IM0000", SQUARE.astype(np.uint16))
    write_dicom(tmp_path / "in/seg.dcm", SQUARE.astype(np.uint16), SOPClassUID="1.2.840.10008.5.1.4.1.1.66.4")
    os.symlink("../store", tmp_path / "in/hospital")
    os.symlink("r0.png", tmp_path / "in/copy.png")
    for name, target in (("loop", "."), ("up", ".."), ("again", ".")):
        os.symlink(target, tmp_path / "in" / name)
    for inputs in (tmp_path / "in", tmp_path / "in/**"):
        found = find_images([str(inputs)], tmp_path / "out")
        names = ["IM0000", "copy.png", "hospital/s0.png", "r0.png"]
        assert [path.relative_to(tmp_path / "in").as_posix() for path in found.images] == names
        assert any("Segmentation (1)" in remark for remark in found.remarks)
        assert any("folder above (3)" in remark for remark in found.remarks)
    pngs = find_images([str(tmp_path / "in/**/*.png")], tmp_path / "out")
    assert [path.name for path in pngs.images] == ["copy.png", "s0.png", "r0.png"]


def test_results_of_another_run_are_recognised_by_their_record(tmp_path, weights, monkeypatch, capsys):
    save_image(tmp_path / "in/x.png", SQUARE)
    save_image(tmp_path / "in/y_mask.png", SQUARE)  # a person's
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        main(["in", "--weights", str(weights), "--output", "in/first", "--probability"])
    assert "2 of 2 images are done already" in capsys.readouterr().out
    found = find_images(["in"], Path("in/second"))
    assert [path.name for path in found.images] == ["x.png", "y_mask.png"]
    assert any("earlier predictions (6)" in remark for remark in found.remarks)


def test_one_name_that_is_too_long_is_one_failed_image(tmp_path, weights, monkeypatch, capsys):
    for name in ("胫" * 80, "x" * 240, "z"):
        save_image(tmp_path / f"in/{name}.png", SQUARE)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: main(["in", "--weights", str(weights), "--output", "out", "--probability"]))
    assert stopped.value.code == 1
    assert "2 of 3 images could not be read or written" in (shown := capsys.readouterr().err)
    assert "shorten the image's name" in shown
    assert (tmp_path / "out/z_probability.png").exists()


def test_lists_archives_and_standard_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a b.png", "c.png"):
        save_image(tmp_path / name, SQUARE)
    for text, encoding in (("a b.png\n\nc.png\n", "utf-8"), ('"a b.png"\r\nc.png\r\n', "utf-16")):
        Path("list.txt").write_text(text, encoding=encoding)
        assert [path.name for path in find_images(["@list.txt"], tmp_path / "out").images] == ["a b.png", "c.png"]
    for wrong, words in (
        ("-", "standard input"),
        ("x.zip", "unpack"),
        ("list.txt", "@list.txt"),
        ("@gone", "No such file"),
        ("", "an empty name"),
        ("https://example.org/x.png", "a web address"),
        ("x.nii.gz", "a volume"),
        ("x.tar.gz", "compressed"),
    ):
        with pytest.raises(UserError, match=words):
            find_images([wrong], tmp_path / "out")


def test_every_input_without_an_image_is_named(tmp_path):
    save_image(tmp_path / "x.png", SQUARE)
    with pytest.raises(UserError, match=r"(?s)y\.png.*z\.png"):
        find_images([str(tmp_path / "y.png"), str(tmp_path / "x.png"), str(tmp_path / "z.png")], tmp_path / "out")


def test_results_keep_the_folders_below_the_common_one_and_never_collide():
    paths = [Path(text) for text in ("/d/a/1.png", "/d/b/1.png", "/d/b/2.png", "/d/b/2.dcm", "/d/b/2.v1.PNG")]
    names = name_results(paths)
    assert [names[path].as_posix() for path in paths] == ["a/1", "b/1", "b/2_png", "b/2_dcm", "b/2.v1"]
    assert name_results([Path("/d/a/1.png")]) == {Path("/d/a/1.png"): Path("1")}
    tricky = [Path(text) for text in ("/d/a.png", "/d/a.dcm", "/d/a_png.png")]
    assert len({str(name).lower() for name in name_results(tricky).values()}) == 3


def test_cleaning_changes_the_mask_and_the_area_but_not_the_probability(tmp_path, weights):
    pixels = SQUARE.copy()
    pixels[18, 25] = 20
    pixels[2, 2] = 200
    save_image(tmp_path / "x.png", pixels)
    rules = ("--largest", "1", "--fill-holes")
    main([str(tmp_path / "x.png"), "--weights", str(weights), "--output", str(tmp_path / "out"), "--npz", *rules])
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out/x_mask.png")), SQUARE > 128)
    assert (tmp_path / "out/areas.csv").read_text() == "image,class,pixels,area_mm2\nx.png,bone,225,\n"
    with np.load(tmp_path / "out/x_probability.npz") as file:
        np.testing.assert_array_equal(file["probability"] > 0.5, pixels > 128)
        assert file["classes"].tolist() == ["background", "bone"]


def test_shards_are_disjoint_complete_and_the_same_in_any_order():
    names = name_results([Path(f"/d/{number}.png") for number in range(23)])
    shares = [take_shard(names, (number, 5)) for number in range(1, 6)]
    assert sorted(path for share in shares for path in share) == sorted(names)
    assert {len(share) for share in shares} == {4, 5}
    shuffled = dict(sorted(names.items(), reverse=True))
    assert [list(take_shard(shuffled, (number, 5))) for number in range(1, 6)] == [list(share) for share in shares]


def test_a_halo_below_the_networks_radius_is_called_approximate(tmp_path, weights, capsys):
    save_image(tmp_path / "x.png", SQUARE)
    common = [str(tmp_path / "x.png"), "--weights", str(weights), "--no-overlay", "--tile", "16"]
    main([*common, "--output", str(tmp_path / "near"), "--halo", "8"])
    assert "approximate; exact from 316" in capsys.readouterr().out
    main([*common, "--output", str(tmp_path / "exact")])
    assert "approximate" not in capsys.readouterr().out
    main([*common[:-2], "--output", str(tmp_path / "exact")])  # the same results: nothing is refused, or done again
    assert "1 of 1 images are done already" in capsys.readouterr().out
