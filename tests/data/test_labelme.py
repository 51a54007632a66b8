"""LabelMe files become the masks that LabelMe shows, hostile ones are refused, and masks come back as polygons."""

import json
import tomllib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from pdrunet_jax.data.dataset import open_dataset
from pdrunet_jax.data.images import read_image
from pdrunet_jax.data.importers.files import Images
from pdrunet_jax.data.importers.labelme import ImportLabelme, import_labelme
from pdrunet_jax.data.labelme.contours import outlines
from pdrunet_jax.data.labelme.raster import rasterise
from pdrunet_jax.data.labelme.read import read_annotation
from pdrunet_jax.data.labelme.write import labelme_text
from pdrunet_jax.data.masks import read_mask
from pdrunet_jax.data.phantoms.phantom import draw
from pdrunet_jax.runtime.errors import DataError, UserError
from tests.support.labelme_files import annotate, box, png, shape
from tests.support.small_data import SIZE, config, noise, save

HEIGHT, WIDTH = SIZE
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An annotations' folder with one image, a.png."""
    save(noise(0), tmp_path / "source" / "a.png")
    return tmp_path / "source"


def masks(source: Path, **options: Any) -> dict[str, np.ndarray]:
    """Import `source` and read back every mask's values, by the mask's path."""
    target = source.parent / "target"
    import_labelme(ImportLabelme(source, target, **options))
    folder = target / "masks"
    return {path.relative_to(folder).as_posix(): np.array(Image.open(path)) for path in folder.rglob("*.png")}


def drawn(shapes: list[dict[str, Any]], source: Path, **options: Any) -> np.ndarray:
    annotate(source / "a.json", "a.png", shapes, SIZE)
    return masks(source, **options)["a.png"]


def refused(source: Path, **options: Any) -> str:
    """The message of a failing import, which must leave nothing behind."""
    before = sorted(source.parent.rglob("*"))
    with pytest.raises(DataError) as caught:
        import_labelme(ImportLabelme(source, source.parent / "target", **options))
    assert sorted(source.parent.rglob("*")) == before
    return str(caught.value)


def test_an_import_is_a_dataset_that_stands_by_itself(source: Path, tmp_path: Path) -> None:
    for index, name in enumerate(("b", "c", "d")):
        save(noise(index + 1), source / "images" / "sub" / f"{name}.png")
        annotate(source / "json" / f"{name}.json", f"..\\images\\sub\\{name}.png", [shape("tibia", box(2, 3, 9, 12))])
    annotate(source / "a.json", "a.png", [shape("femur", box(1, 1, 5, 5))], SIZE)
    notes = import_labelme(ImportLabelme(source, tmp_path / "target"))
    source.rename(tmp_path / "gone")
    dataset = open_dataset(config(tmp_path / "target"))
    assert dataset.class_names == ("femur", "tibia")
    assert [sample.id for sample in dataset.samples][:2] == ["images/a.png", "images/images/sub/b.png"]
    sample = dataset.samples[1]
    assert sample.mask is not None
    expected = np.zeros(SIZE, np.uint8)
    expected[3:13, 2:10] = 2
    assert (read_mask(sample.mask, dataset.coding) == expected).all()
    assert (read_image(sample.image)[:, :, 0] == noise(1)).all()
    assert any("--classes femur 1 tibia 2" in note for note in notes)


def test_references_name_the_images_where_they_are(source: Path, tmp_path: Path) -> None:
    drawn([shape("femur", box(1, 1, 5, 5))], source, by_reference=True)
    assert not (tmp_path / "target" / "images").exists()
    assert open_dataset(config(tmp_path / "target")).samples[0].image == source / "a.png"


def test_a_file_of_version_3_reads(source: Path) -> None:
    old = {"version": "3.16.7", "lineColor": [0, 255, 0, 128], "fillColor": [255, 0, 0, 128], "imageData": None}
    old |= {"shapes": [shape("femur", box(2, 2, 6, 8), None, line_color=None, fill_color=None)], "imagePath": "a.png"}
    (source / "a.json").write_text(json.dumps(old))
    assert (masks(source)["a.png"][2:9, 2:7] == 1).all()


@pytest.mark.parametrize(
    ("kind", "points", "pixels"),
    [
        ("polygon", [[2.4, 3.7], [9.9, 3.2], [9.1, 12.8]], None),
        ("rectangle", [[9.5, 12.5], [2.5, 3.5]], 8 * 10),
        ("oriented_rectangle", box(2.5, 3.5, 9.5, 12.5), 8 * 10),
        ("circle", [[10.0, 9.0], [14.0, 9.0]], None),
    ],
)
def test_shapes_are_drawn_as_labelme_draws_them(
    source: Path, kind: str, points: list[list[float]], pixels: int | None
) -> None:
    mask = drawn([shape("bone", points, kind)], source)
    expected = Image.new("L", (WIDTH, HEIGHT))
    pen = ImageDraw.Draw(expected)
    xy = [tuple(point) for point in points]
    if kind == "circle":
        pen.ellipse([6, 5, 14, 13], outline=1, fill=1)
    elif kind == "rectangle":
        pen.rectangle([xy[1], xy[0]], outline=1, fill=1)
    else:
        pen.polygon(xy, outline=1, fill=1)
    assert (mask == np.array(expected)).all()
    assert pixels is None or (mask == 1).sum() == pixels


def test_a_mask_shape_is_pasted_into_its_box(source: Path) -> None:
    patch = np.zeros((4, 5), np.uint8)
    patch[1:, 2:] = 255
    mask = drawn([shape("bone", [[3.0, 6.0], [7.0, 9.0]], "mask", mask=png(patch))], source)
    expected = np.zeros(SIZE, np.uint8)
    expected[7:10, 5:8] = 1
    assert (mask == expected).all()


def test_later_shapes_lie_over_earlier_ones_and_background_cuts_out(source: Path) -> None:
    shapes = [
        shape("femur", box(1, 1, 12, 12)),
        shape("_background_", box(4, 4, 6, 6)),
        shape("tibia", box(8, 8, 16, 16)),
        shape("__ignore__", box(1, 1, 2, 2)),
    ]
    mask = drawn(shapes, source)
    assert [mask[3, 3], mask[5, 5], mask[10, 10], mask[1, 1], mask[19, 0]] == [1, 0, 2, 255, 0]
    assert tomllib.loads((source.parent / "target" / "dataset.toml").read_text())["ignore"] == 255


def test_lines_and_points_have_no_area_which_is_said(source: Path) -> None:
    shapes = [shape("femur", box(1, 1, 4, 4)), shape("ruler", [[0, 0], [9, 9]], "line"), shape("x", [[9, 9]], "point")]
    annotate(source / "a.json", "a.png", shapes, SIZE)
    notes = import_labelme(ImportLabelme(source, source.parent / "target", classes={"femur": 1}))
    assert "skipped, having no area: 1 line, 1 point" in notes


def test_a_rectangle_around_its_own_polygon_is_a_box_unless_kept(source: Path) -> None:
    shapes = [
        shape("femur", [[1.5, 2.5], [17.0, 2.0]], "rectangle") | {"points": [[1.5, 1.5], [12.0, 17.0]]},
        shape("femur", [[2, 2], [11, 3], [6, 16]]),
        shape("tibia", [[14, 2], [20, 8]], "rectangle"),
    ]
    annotate(source / "a.json", "a.png", shapes, SIZE)
    notes = import_labelme(ImportLabelme(source, source.parent / "dropped"))
    assert any(note.startswith("1 rectangles around") for note in notes)
    mask = np.array(Image.open(source.parent / "dropped" / "masks" / "a.png"))
    assert mask[15, 2] == 0
    assert (mask[2:9, 14:21] == 2).all()
    assert drawn(shapes, source, boxes="keep")[15, 2] == 1


def test_the_image_file_beats_embedded_data_of_another_contrast(source: Path) -> None:
    annotate(source / "a.json", "a.png", [shape("bone", box(1, 1, 5, 5))], imageData=png(noise(0) // 3))
    import_labelme(ImportLabelme(source, source.parent / "target"))
    assert (read_image(source.parent / "target" / "images" / "a.png")[:, :, 0] == noise(0)).all()


def test_embedded_data_serves_where_there_is_no_file(source: Path, tmp_path: Path) -> None:
    annotate(source / "b.json", "../source/b.dcm", [shape("bone", box(1, 1, 5, 5))], SIZE, imageData=png(noise(7)))
    notes = import_labelme(ImportLabelme(source, tmp_path / "target"))
    assert (read_image(tmp_path / "target" / "images" / "b.png")[:, :, 0] == noise(7)).all()
    assert "1 images have no file: taken from imageData" in notes
    assert any(note.startswith("1 images without an annotation are left out: a.png") for note in notes)


def test_labels_are_numbered_as_declared(source: Path) -> None:
    shapes = [shape(label, box(x, 2, x + 3, 9)) for label, x in (("left femur", 1), ("right femur", 6), ("cast", 12))]
    mask = drawn(shapes, source, classes={"left femur": 3, "right femur": 3, "cast": 0})
    assert [mask[5, 2], mask[5, 7], mask[5, 13]] == [3, 3, 0]
    assert open_dataset(config(source.parent / "target")).class_names == ("left femur",)


def test_unknown_labels_are_listed_together_with_the_declared(source: Path) -> None:
    shapes = [shape("tibai", box(1, 1, 4, 4)), shape("ulna", box(5, 5, 8, 8)), shape("femur", box(9, 9, 12, 12))]
    annotate(source / "a.json", "a.png", shapes, SIZE)
    message = refused(source, classes={"femur": 1, "tibia": 2})
    for words in ('"tibai" (in a.json) is not declared; did you mean tibia?', '"ulna"', "declares femur 1, tibia 2"):
        assert words in message


@pytest.mark.parametrize(
    "path", ["../../etc/passwd", "/etc/passwd", "..\\..\\secret.png", "C:\\secret.png", "\\\\server\\x.png"]
)
def test_an_image_path_never_leads_out_of_the_folder(source: Path, path: str) -> None:
    save(noise(3), source.parent / "secret.png")
    whole = [shape("bone", box(1, 1, 5, 5))]
    annotate(source / "sub" / "evil.json", path, whole, SIZE)
    assert "does not exist, and none is embedded" in refused(source)
    annotate(source / "sub" / "evil.json", path, whole, SIZE, imageData=png(noise(1)))
    import_labelme(ImportLabelme(source, source.parent / "target"))
    (copy,) = (source.parent / "target" / "images" / "sub").iterdir()
    assert (read_image(copy)[:, :, 0] == noise(1)).all()


def test_a_name_that_is_none_and_a_link_that_leads_out_are_refused(source: Path) -> None:
    save(noise(3), source.parent / "secret.png")
    (source / "link.png").symlink_to(source.parent / "secret.png")
    whole = [shape("bone", box(1, 1, 5, 5))]
    for number, path in enumerate(("..", "a\u0000.png", "link.png")):
        annotate(source / f"{number}.json", path, whole, SIZE, imageData=png(noise(1)))
    message = refused(source)
    assert "0.json: image path '..' names no file" in message
    assert "1.json: image path 'a\\x00.png' names no file" in message
    assert "2.json: image link.png is a link that leads out of" in message


@pytest.mark.parametrize(
    "path", ["C:\\Users\\me\\a.png", "/home/me/a.png", "..\\..\\export\\a.png", "a.jpg", "A.PNG", "x/y/a.png"]
)
def test_an_image_path_from_elsewhere_is_found_by_its_file_name(tmp_path: Path, path: str) -> None:
    for person in ("p1", "p2"):
        save(noise(3), tmp_path / "source" / "img" / person / "a.png")
        annotate(tmp_path / "source" / "ann" / person / "a.json", path, [shape("bone", box(1, 1, 5, 5))], SIZE)
    notes = import_labelme(ImportLabelme(tmp_path / "source", tmp_path / "target"))
    assert "2 images are not at the path stated; found by their file names: img/p1/a.png, img/p2/a.png" in notes
    # An image that merely has the name is not taken.
    annotate(tmp_path / "source" / "ann" / "p3" / "a.json", path, [shape("bone", box(1, 1, 5, 5))], SIZE)
    with pytest.raises(DataError, match=r"p3/a.json: its image [aA].\w+ does not exist"):
        import_labelme(ImportLabelme(tmp_path / "source", tmp_path / "other"))


def test_folders_of_splits_are_kept_and_labels_share_a_class(source: Path, tmp_path: Path) -> None:
    for number, folder in enumerate(("train", "train2017", "val", "test")):
        save(noise(number), source / folder / "x.png")
        label = ("femur", "tibia")[number % 2]
        annotate(source / folder / "x.json", "x.png", [shape(label, box(1, 1, 5, 5))], SIZE)
    for number in range(30):
        save(noise(number + 10), source / "train" / f"bare{number}.png")
    (source / "a.png").unlink()
    notes = import_labelme(ImportLabelme(source, tmp_path / "a", classes={"bone=femur,tibia": 1}))
    assert "splits of the source are kept: 1 test, 2 train, 1 val" in notes
    (line,) = [note for note in notes if note.startswith("30 images without an annotation are left out")]
    assert "--unlabelled background" in line
    assert "label tibia counts as bone" in notes
    dataset = open_dataset(config(tmp_path / "a"))
    assert dataset.class_names == ("bone",)
    assert [sample.split for sample in dataset.samples] == ["test", "train", "train", "val"]
    import_labelme(ImportLabelme(source, tmp_path / "b", unlabelled="background"))
    assert len(open_dataset(config(tmp_path / "b")).samples) == 34
    with pytest.raises(UserError, match='"femur" is declared twice'):
        import_labelme(ImportLabelme(source, tmp_path / "c", classes={"bone=femur,tibia": 1, "femur": 2}))


def test_text_of_another_encoding_is_read_when_named(source: Path) -> None:
    path = annotate(source / "a.json", "a.png", [shape("bone", box(1, 1, 5, 5))], SIZE)
    path.write_bytes(path.read_text().replace("bone", "股骨").encode("gb18030"))
    assert "--encoding gb18030" in refused(source)
    assert "neither UTF-8 nor ascii text" in refused(source, encoding="ascii")
    assert (masks(source, encoding="gb18030", classes={"股骨": 1})["a.png"][1:6, 1:6] == 1).all()
    with pytest.raises(UserError, match="--encoding klingon"):
        import_labelme(ImportLabelme(source, source.parent / "other", encoding="klingon"))


def test_the_xml_of_cvat_reads_with_its_bitmaps(source: Path) -> None:
    bitmap = np.zeros(SIZE, np.uint8)
    bitmap[10:14, 12:20] = 255
    save(bitmap, source / "Masks" / "a_mask_1.png")
    points = "".join(f"<pt><x>{x}</x><y>{y}</y></pt>" for x, y in box(1, 1, 5, 5))
    size = f"<imagesize><nrows>{HEIGHT}</nrows><ncols>{WIDTH}</ncols></imagesize>"
    mask = "<object><name>tibia</name><segm><mask>a_mask_1.png</mask></segm></object>"
    text = f"<annotation><filename>a.png</filename>{size}<object><name>femur</name><polygon>{points}</polygon></object>"
    (source / "a.xml").write_text(f"{text}{mask}</annotation>")
    drawn = masks(source)["a.png"]
    assert (drawn[1:6, 1:6] == 1).all()
    assert ((drawn == 2) == (bitmap > 0)).all()
    for wrong, reason in (
        (text.replace(size, "") + "<object>", "not valid XML"),
        ('<!DOCTYPE a [<!ENTITY e "x">]>' + text, "document type"),
        (f"{text}{mask.replace('a_mask', '../../secret')}</annotation>", "leads out"),
        (f"{text.replace('<x>5</x>', '<x>nan</x>')}</annotation>", "finite"),
    ):
        (source / "a.xml").write_text(wrong)
        assert reason in refused_quietly(source)


def test_what_takes_too_long_to_draw_is_refused_and_boxes_are_found_fast(source: Path) -> None:
    save(np.zeros((50_000, 2), np.uint8), source / "a.png")
    zigzag = [[number % 2, (number * 7919) % 50_000] for number in range(10_000)]
    annotate(source / "a.json", "a.png", [shape("bone", zigzag)])
    assert "are too long, or their areas too large" in refused(source)
    save(noise(0), source / "a.png")
    many = [shape("bone", [[1, 1], [3, 1], [3, 3]])] * 5000 + [shape("bone", [[9, 9], [12, 12]], "rectangle")] * 5000
    assert drawn(many, source)[10, 10] == 1


def refused_quietly(source: Path) -> str:
    """The message of a failing import after others that succeeded."""
    with pytest.raises(DataError) as caught:
        import_labelme(ImportLabelme(source, source.parent / "refused"))
    return str(caught.value)


def test_an_image_path_beside_the_json_folder_is_followed(source: Path) -> None:
    annotate(source / "json" / "a.json", "../a.png", [shape("bone", box(1, 1, 5, 5))], SIZE)
    assert (masks(source)["a.png"][1:6, 1:6] == 1).all()


def test_every_problem_of_every_file_is_reported_at_once(source: Path) -> None:
    good = [shape("bone", box(1, 1, 5, 5))]
    bad: dict[str, tuple[list[Any], dict[str, Any], str]] = {
        "size": (good, {"imageHeight": 10**30}, "imageHeight"),
        "other": (good, {"imageHeight": 40, "imageWidth": 48}, "drawn on 48x40 pixels, but "),
        "huge": (good, {"imageHeight": 10**8, "imageWidth": 10**8}, "drawn on 100000000x100000000 pixels"),
        "nan": ([shape("bone", [[1, 1], [float("nan"), 2], [5, 5]])], {}, "finite"),
        "inf": ([shape("bone", [[1, 1], [float("inf"), 2], [5, 5]])], {}, "finite"),
        "far": ([shape("bone", [[1, 1], [1e8, 2], [5, 5]])], {}, "far outside"),
        "circle": ([shape("bone", [[1, 1], [1e8, 2]], "circle")], {}, "far outside"),
        "few": ([shape("bone", [[1, 1], [5, 5]])], {}, "a polygon of 2 points"),
        "many": ([shape("bone", [[1, 1]] * 200_001)], {}, "200,001 points"),
        "pairs": ([shape("bone", [[1, 1, 1], [2, 2], [3, 3]])], {}, "pairs"),
        "text": ([shape("bone", [["1", 1], [2, 2], [3, 3]])], {}, "pairs"),
        "half": ([shape("a\ud800", box(1, 1, 5, 5))], {}, "must be printable text"),
        "label": (
            [shape("", box(1, 1, 5, 5)), {**good[0], "label": {"a": 1}}],
            {},
            "label a dict must be printable text",
        ),
        "kind": ([shape("bone", box(1, 1, 5, 5), "spline")], {}, "shape_type 'spline' is unknown"),
        "object": (["bone"], {}, "shape 1: must be an object"),
        "shapes": (good, {"shapes": {"a": 1}}, "shapes must be a list"),
        "path": (good, {"imagePath": 7}, "imagePath is missing"),
        "base64": ([shape("bone", [[1, 1], [3, 3]], "mask", mask="%%%")], {}, "not valid base64"),
        "nopng": ([shape("bone", [[1, 1], [3, 3]], "mask", mask="AAAA")], {}, "its mask is not a PNG"),
        "nomask": ([shape("bone", [[1, 1], [3, 3]], "mask")], {}, "without mask data"),
        "corner": ([shape("bone", [[1, 1], [9, 9]], "mask", mask=png(noise(0)))], {}, "24x20 pixels, but its corners"),
        "gone": (good, {"imagePath": "none.png"}, "none.png does not exist, and none is embedded"),
        "data": (good, {"imagePath": "no1.png", "imageData": "*"}, "imageData is not valid base64"),
        "noimage": (good, {"imagePath": "no2.png", "imageData": "AAAA"}, "no PNG, JPEG"),
        "datasize": (good, {"imagePath": "no3.png", "imageData": png(noise(0)[:9])}, "imageData has 24x9"),
    }
    for number, (name, (shapes, extra, _)) in enumerate(bad.items()):
        save(noise(number), source / f"{name}.png")
        annotate(source / f"{name}.json", f"{name}.png", shapes, None if name.startswith("no") else SIZE, **extra)
    texts = {"deep": "[" * 100_000, "cut": '{"shapes": [', "digits": '{"shapes": ' + "9" * 5000 + "}"}
    for name, text in texts.items():
        (source / f"{name}.json").write_text(text)
    (source / "bytes.json").write_bytes(b"\xff\xfe\x00{")
    annotate(source / "twice.json", "size.png", good)
    annotate(source / "again.json", "size.png", good)
    message = refused(source)
    for name, (_, _, reason) in bad.items():
        lines = [line for line in message.splitlines() if line.startswith(f"  - {name}.json: ")]
        assert any(reason in line for line in lines), (name, lines)
    for name in (*texts, "bytes"):
        assert f"  - {name}.json: " in message
    assert "twice.json: size.png is already annotated in again.json" in message


def test_a_bomb_inside_a_mask_shape_is_not_unpacked(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = png(np.zeros((3000, 3000), np.uint8))
    annotate(source / "a.json", "a.png", [shape("bone", [[0, 0], [9, 9]], "mask", mask=bomb)], SIZE)
    assert "3000x3000 pixels, but its corners leave 10x10" in refused(source)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    annotate(source / "a.json", "gone.png", [shape("bone", box(1, 1, 5, 5))], imageData=bomb)
    assert "bomb" in refused(source)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    damage=st.dictionaries(st.sampled_from(["shapes", "imagePath", "imageData", "imageHeight", "version"]), JSON),
    inner=st.dictionaries(st.sampled_from(["label", "points", "shape_type", "mask"]), JSON),
    kind=st.sampled_from(["polygon", "circle", "rectangle", "mask", "line"]),
)
def test_a_damaged_file_is_drawn_or_refused_but_never_crashes(
    tmp_path: Path, damage: dict[str, Any], inner: dict[str, Any], kind: str
) -> None:
    whole = shape("bone", [[1, 1], [3, 3]], kind, mask=png(np.ones((3, 3), np.uint8)))
    path = annotate(tmp_path / "a.json", "a.png", [whole | inner], SIZE, **damage)
    with suppress(DataError):
        annotation = read_annotation(path, "a.json")
        if annotation is not None:
            Images(tmp_path).find(annotation.image_path, "", "a.json")
            assert rasterise(annotation.shapes, {s.label: 1 for s in annotation.shapes}, SIZE, "a").shape == SIZE


def test_an_image_on_its_side_is_annotated_upright_as_labelme_shows_it(source: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    save(noise(5), source / "side.jpg", exif=exif)
    annotate(source / "side.json", "side.jpg", [shape("bone", box(1, 1, 5, 15))], (WIDTH, HEIGHT))
    assert masks(source)["side.png"].shape == (WIDTH, HEIGHT)
    assert len(open_dataset(config(source.parent / "target")).samples) == 1


def test_other_json_and_system_files_are_passed_over(source: Path) -> None:
    (source / "coco.json").write_text('{"images": [], "annotations": []}')
    (source / "list.json").write_text("[1, 2]")
    (source / "._a.json").write_bytes(b"\x00\x05")
    annotate(source / "a.json", "a.png", [shape("bone", box(1, 1, 5, 5))], SIZE)
    notes = import_labelme(ImportLabelme(source, source.parent / "target"))
    assert "skipped, not LabelMe: coco.json, list.json" in notes


def test_a_folder_that_is_in_use_is_left_alone(source: Path, tmp_path: Path) -> None:
    annotate(source / "a.json", "a.png", [shape("bone", box(1, 1, 5, 5))], SIZE)
    with pytest.raises(UserError, match="not empty"):
        import_labelme(ImportLabelme(source, source))
    with pytest.raises(UserError, match="is not a folder"):
        import_labelme(ImportLabelme(tmp_path / "absent", tmp_path / "target"))
    (source / "a.json").unlink()
    with pytest.raises(UserError, match="no LabelMe file"):
        import_labelme(ImportLabelme(source, tmp_path / "target"))
    with pytest.raises(UserError, match="--classes bone 300"):
        import_labelme(ImportLabelme(source, tmp_path / "target", classes={"bone": 300}))


def test_masks_of_one_stem_do_not_overwrite_each_other(source: Path) -> None:
    save(noise(1), source / "A.bmp")
    annotate(source / "a.json", "a.png", [shape("bone", box(1, 1, 5, 5))], SIZE)
    annotate(source / "b.json", "A.bmp", [shape("bone", box(6, 6, 9, 9))], SIZE)
    assert masks(source).keys() == {"a.png.png", "A.bmp.png"}


def test_the_command_imports_and_reports(run: Callable[..., Any], source: Path, tmp_path: Path) -> None:
    annotate(source / "a.json", "a.png", [shape("femur", box(1, 1, 5, 5))], SIZE)

    good = run("import-labelme", source, tmp_path / "target", "--classes", "femur", "1", "tibia", "2")
    assert (good.returncode, good.stderr) == (0, "")
    assert "declared, but in no file: tibia" in good.stdout
    bad = run("import-labelme", source, tmp_path / "other", "--classes", "tibia", "2")
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: ")
    assert 'label "femur"' in bad.stderr


def redrawn(mask: np.ndarray, names: tuple[str, ...], folder: Path, tolerance: float) -> np.ndarray:
    (folder / "x.json").write_text(labelme_text(mask, names, "x.png", tolerance=tolerance), encoding="utf-8")
    annotation = read_annotation(folder / "x.json", "x.json")
    assert annotation is not None
    index_of = {name: index for index, name in enumerate(names, start=1)} | {"__ignore__": 255}
    return rasterise(annotation.shapes, index_of, (mask.shape[0], mask.shape[1]), "x.json")


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())


@pytest.mark.parametrize("index", range(6))
def test_bones_survive_the_round_trip_at_one_pixel_of_tolerance(index: int, tmp_path: Path) -> None:
    mask = draw(index, size=256).mask
    again = redrawn(mask, ("bone",), tmp_path, 1.0)
    assert dice(mask == 1, again == 1) >= 0.995
    points = [len(shape["points"]) for shape in json.loads((tmp_path / "x.json").read_text())["shapes"]]
    assert sum(points) < 200  # few enough to be moved by hand


@pytest.mark.parametrize("degrees", [0, 7, 33, 45, 80, 90])
def test_a_shaft_of_fifteen_pixels_survives_at_any_angle(degrees: int, tmp_path: Path) -> None:
    rows, columns = np.mgrid[-128:128, -128:128]
    turn = np.radians(degrees)
    along = columns * np.cos(turn) + rows * np.sin(turn)
    across = rows * np.cos(turn) - columns * np.sin(turn) - 6 * np.sin(along / 50)
    mask = ((np.abs(along) < 90) & (np.abs(across) < 7.5 + 4 * (along / 90) ** 4)).astype(np.uint8)
    assert dice(mask == 1, redrawn(mask, ("bone",), tmp_path, 1.0) == 1) >= 0.995


def test_a_round_trip_without_tolerance_is_exact_for_holes_islands_and_neighbours(tmp_path: Path) -> None:
    mask = np.zeros((40, 50), np.uint8)
    mask[2:30, 3:25] = 1
    mask[6:12, 6:12] = 0  # a hole
    mask[8:10, 8:10] = 1  # an island in it
    mask[15:25, 8:14] = 2  # another class inside
    mask[10:38, 25:45] = 2
    mask[20, 30] = 0  # a hole of one pixel
    mask[0, 49] = mask[1, 48] = 1  # two that touch by a corner
    mask[39, 0] = 2  # one pixel
    mask[35, 5:15] = 1  # a line
    mask[33:36, 46:50] = 255
    assert (redrawn(mask, ("femur", "tibia"), tmp_path, 0.0) == mask).all()


def test_no_outline_is_further_off_than_the_tolerance() -> None:
    rows, columns = np.mgrid[:120, :150]
    region = np.hypot((rows - 60) / 40, (columns - 75) / 60) + 0.05 * np.sin(columns / 3) < 1
    (exact,), (simple,) = outlines(region, 0.0), outlines(region, 1.5)
    assert len(simple) < len(exact) / 3
    ends = np.roll(simple, -1, axis=0)
    along = (ends - simple).astype(float)
    offset = exact[:, None, :] - simple[None, :, :]
    share = np.clip((offset * along[None]).sum(2) / (along**2).sum(1)[None, :], 0, 1)
    distance = np.linalg.norm(offset - share[:, :, None] * along[None], axis=2).min(axis=1)
    assert distance.max() <= 1.5 + 1e-6


def test_what_is_written_is_a_labelme_5_file() -> None:
    mask = np.zeros(SIZE, np.uint8)
    mask[3:12, 4:15] = 1
    content = json.loads(labelme_text(mask, ("Oberschenkelknochen äöü",), "..\\images\\x.png"))
    assert content["version"].startswith("5.")
    assert (content["imageHeight"], content["imageWidth"], content["imageData"]) == (HEIGHT, WIDTH, None)
    assert content["imagePath"] == "../images/x.png"
    (only,) = content["shapes"]
    assert only.keys() == {"label", "points", "group_id", "description", "shape_type", "flags", "mask"}
    assert (only["label"], only["shape_type"]) == ("Oberschenkelknochen äöü", "polygon")
    assert sorted(only["points"]) == [[4.5, 3.5], [4.5, 11.5], [14.5, 3.5], [14.5, 11.5]]


def test_a_mask_with_classes_that_have_no_name_is_refused() -> None:
    with pytest.raises(UserError, match="class 2"):
        labelme_text(np.full(SIZE, 2, np.uint8), ("bone",), "x.png")
