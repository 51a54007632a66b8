"""Every mask coding seen in public data comes out as the classes that its author drew."""

import io
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pdrunet_jax.config import from_dict
from pdrunet_jax.data.dataset import Dataset, open_dataset
from pdrunet_jax.data.masks import IGNORE, declare, read_mask, read_soft_mask, resize_mask
from pdrunet_jax.runtime.errors import DataError, UserError
from tests.support.seen_data import deep_png
from tests.support.small_data import SIZE, config, noise, save, shapes

Folder = Callable[..., Path]
PALETTE = [0, 0, 0, 128, 0, 0, 0, 128, 0]


def palette_image(indices: np.ndarray, palette: list[int] = PALETTE, alpha: bytes | None = None) -> Image.Image:
    image = Image.new("P", indices.shape[::-1])
    image.putdata(indices.ravel().tolist())
    image.putpalette(palette)
    stream = io.BytesIO()
    image.save(stream, "PNG", **({} if alpha is None else {"transparency": alpha}))
    return Image.open(stream)


def first_mask(dataset: Dataset) -> np.ndarray:
    mask = dataset.samples[0].mask
    assert mask is not None
    return read_mask(mask, dataset.coding)


def test_palette_masks_are_read_by_index(folder: Folder) -> None:
    root = folder(mask=lambda i: palette_image(shapes(i)))
    dataset = open_dataset(config(root, classes={"a": 1, "b": 2}))
    assert dataset.class_names == ("a", "b")
    assert dataset.outputs == 3
    np.testing.assert_array_equal(first_mask(dataset), shapes(0))


def test_palette_masks_are_read_by_colour_too(folder: Folder) -> None:
    root = folder(mask=lambda i: palette_image(shapes(i)))
    dataset = open_dataset(config(root, classes={"b": "#008000", "a": "#800000"}))
    np.testing.assert_array_equal(first_mask(dataset), np.array([0, 2, 1])[shapes(0)])


def test_palette_masks_with_soft_alpha_are_their_alpha_not_their_index(folder: Folder) -> None:
    def drawn(i: int) -> Image.Image:  # index 0 is the opaque red, later ones ever more transparent
        indices = np.full(SIZE, 218, np.uint8)
        indices[4:12, 4:12] = 0
        indices[4:12, 12:16] = [20, 80, 130, 200]
        alpha = bytes(max(0, 255 - index * 255 // 218) for index in range(219))
        return palette_image(indices, [200, 0, 0] * 219, alpha)

    dataset = open_dataset(config(folder(mask=drawn), classes={"bone": 255}, threshold=120))
    expected = np.zeros(SIZE, np.uint8)
    expected[4:12, 4:14] = 1  # 255, 232 and 162 of 255; 103 is below the threshold
    np.testing.assert_array_equal(first_mask(dataset), expected)


def test_an_opaque_palette_entry_beside_a_transparent_one_keeps_its_index(folder: Folder) -> None:
    root = folder(mask=lambda i: palette_image(shapes(i), PALETTE, bytes([0, 255, 255])))
    dataset = open_dataset(config(root, classes={"a": 1, "b": 2}))
    np.testing.assert_array_equal(first_mask(dataset), shapes(0))


@pytest.mark.parametrize("value", [1, 255, 200])
def test_undeclared_binary_grey_is_foreground_and_the_log_says_so(folder: Folder, value: int) -> None:
    root = folder(mask=lambda i: ((shapes(i) > 0) * value).astype(np.uint8))
    dataset = open_dataset(config(root))
    assert dataset.class_names == ("foreground",)
    assert dataset.outputs == 1
    assert any(f"{value} was taken as foreground" in note for note in dataset.notes)
    np.testing.assert_array_equal(first_mask(dataset), shapes(0) > 0)


def test_one_bit_masks_are_binary(folder: Folder) -> None:
    dataset = open_dataset(config(folder(mask=lambda i: Image.fromarray(shapes(i) > 0))))
    np.testing.assert_array_equal(first_mask(dataset), shapes(0) > 0)


def test_sixteen_bit_masks_keep_their_values(folder: Folder) -> None:
    root = folder(mask=lambda i: shapes(i).astype(np.uint16) * 300)
    dataset = open_dataset(config(root, classes={"a": 300, "b": 600}))
    np.testing.assert_array_equal(first_mask(dataset), shapes(0))


def test_a_blue_background_is_no_class(folder: Folder) -> None:
    colours = np.array([[0, 0, 255], [0, 255, 0], [255, 0, 0]], np.uint8)
    root = folder(mask=lambda i: colours[shapes(i)])
    dataset = open_dataset(config(root, classes={"femur": "#00ff00", "tibia": "#ff0000"}))
    assert any('"#0000ff" was taken as background' in note for note in dataset.notes)
    np.testing.assert_array_equal(first_mask(dataset), shapes(0))


def test_a_declared_background_is_no_class(folder: Folder) -> None:
    root = folder(mask=lambda i: np.array([255, 7, 9], np.uint8)[shapes(i)])
    dataset = open_dataset(config(root, classes={"background": 255, "a": 7, "b": 9}))
    assert dataset.class_names == ("a", "b")
    np.testing.assert_array_equal(first_mask(dataset), shapes(0))


def test_undeclared_yellow_on_black_is_binary_with_an_empty_mask_among_them(folder: Folder) -> None:
    root = folder(mask=lambda i: np.array([[0, 0, 0], [255, 255, 0], [0, 0, 0]], np.uint8)[shapes(i) * (i != 3)])
    dataset = open_dataset(config(root))
    assert any('"#ffff00" was taken as foreground' in note for note in dataset.notes)
    assert "warning: 1 empty masks: masks/x003.png" in dataset.notes
    np.testing.assert_array_equal(first_mask(dataset), shapes(0) == 1)


def test_small_red_values_with_full_alpha_are_numbers(folder: Folder) -> None:
    def drawn(i: int) -> np.ndarray:
        pixels = np.zeros((*SIZE, 4), np.uint8)
        pixels[:, :, 0], pixels[:, :, 3] = shapes(i), 255
        return pixels

    root = folder(mask=drawn)
    np.testing.assert_array_equal(first_mask(open_dataset(config(root, classes={"a": 1, "b": 2}))), shapes(0))
    (root / "dataset.toml").write_text("classes = { nucleus = [1, 2] }")
    np.testing.assert_array_equal(first_mask(open_dataset(config(root))), shapes(0) > 0)


@pytest.mark.parametrize("nucleus", ["1,2", "1, 2"])
def test_a_class_may_have_several_values_on_the_command_line_too(folder: Folder, nucleus: str) -> None:
    dataset = open_dataset(config(folder(mask=shapes), classes={"nucleus": nucleus}))
    np.testing.assert_array_equal(first_mask(dataset), shapes(0) > 0)


def test_settings_may_list_values_and_colours() -> None:
    values = {"classes": {"a": [1, 2], "b": ["#ff0000", "#00ff00"]}, "ignore": [3, 4]}
    settings = from_dict({"data": values}, "x.toml").data
    coding = declare(settings.classes, settings.ignore)
    assert coding.names == ("a", "b")
    assert len(coding.known) == 6


def test_masks_of_sixteen_bit_colour_are_refused(folder: Folder) -> None:
    root = folder()
    (root / "masks" / "x001.png").write_bytes(deep_png(np.stack([shapes(1)] * 3, axis=-1)))
    with pytest.raises(DataError, match=r"masks/x001\.png: 16 bits in each of several channels"):
        open_dataset(config(root))


def test_one_colour_drawn_on_transparent_ground_is_its_alpha(folder: Folder) -> None:
    def drawn(i: int) -> np.ndarray:
        pixels = np.zeros((*SIZE, 4), np.uint8)
        pixels[shapes(i) > 0] = [10, 200, 90, 255]
        return pixels

    np.testing.assert_array_equal(first_mask(open_dataset(config(folder(mask=drawn)))), shapes(0) > 0)


def test_ignore_is_neither_background_nor_class(folder: Folder) -> None:
    root = folder(mask=lambda i: np.array([0, 255, 127], np.uint8)[shapes(i)])
    (root / "dataset.toml").write_text('name = "lungs"\nclasses = { lung = 255 }\nignore = 127\n')
    dataset = open_dataset(config(root))
    assert dataset.name == "lungs"
    assert dataset.outputs == 1
    np.testing.assert_array_equal(first_mask(dataset), np.array([0, 1, IGNORE])[shapes(0)])


def soft(i: int) -> np.ndarray:
    large = Image.fromarray((shapes(i) > 0).astype(np.uint8) * 255).resize((192, 160), Image.Resampling.BICUBIC)
    return np.asarray(large.rotate(10).resize(SIZE[::-1], Image.Resampling.BILINEAR))


def test_soft_edges_of_a_declared_class_are_cut_at_128_and_the_log_says_so(folder: Folder) -> None:
    def large(pixels: np.ndarray) -> Image.Image:
        return Image.fromarray(pixels).resize((480, 400), Image.Resampling.NEAREST)

    root = folder(mask=lambda i: large((shapes(i) > 0).astype(np.uint8) * 255).rotate(7, Image.Resampling.BICUBIC))
    for index in range(6):
        save(large(noise(index)), root / "images" / f"x{index:03}.png")
    (root / "masks" / "x001.png").rename(root / "kept.png")
    save(large(noise(9)), root / "masks" / "x001.png")
    for settings in ({"classes": {"bone": 255}}, {"classes": {"bone": 255}, "threshold": 128}, {}):
        with pytest.raises(DataError, match=r"1 problem:\n  - masks/x001.png: only .*is it a photograph\?"):
            open_dataset(config(root, **settings))
    (root / "kept.png").rename(root / "masks" / "x001.png")
    dataset = open_dataset(config(root, classes={"bone": 255}))
    assert any("from 128 on count as bone" in note for note in dataset.notes)
    grey = np.asarray(Image.open(root / "masks" / "x000.png"))
    np.testing.assert_array_equal(first_mask(dataset), grey >= 128)


def test_wide_soft_edges_need_a_declared_threshold(folder: Folder) -> None:
    with pytest.raises(DataError, match="or declare threshold = 128 if its edges are soft"):
        open_dataset(config(folder(mask=soft), classes={"bone": 255}))


@pytest.mark.parametrize(
    ("mask", "hint"),
    [
        # Some masks 0/1, others 0/255.
        (lambda i: (shapes(i) > 0).astype(np.uint8) * np.uint8(1 if i < 2 else 255), "foreground = [1, 255]"),
        (lambda i: (shapes(i) > 0).astype(np.uint8) * np.uint8(254 if i < 2 else 255), "foreground = [254, 255]"),
        # JPEG losses of high quality.
        (lambda i: np.array([1, 254, 255], np.uint8)[shapes(i)] * np.uint8(noise(i) > 9), "threshold = 128"),
        # A class for each image.
        (lambda i: (shapes(i) > 0).astype(np.uint8) * np.uint8(1 + i % 2), "name1 = 1, name2 = 2"),
        (lambda i: np.array([0, 1, 255], np.uint8)[shapes(i)], "foreground = 1 } with ignore = 255"),
    ],
)
def test_hints_read_the_masks_they_are_given_for(folder: Folder, mask: Callable[[int], np.ndarray], hint: str) -> None:
    root = folder(mask=mask)
    with pytest.raises(DataError) as caught:
        open_dataset(config(root))
    assert hint in str(caught.value)
    declaration = re.search(r"(classes = \{[^}]*\})(?: (?:and|with) (\w+ = \d+))?", str(caught.value))
    assert declaration
    (root / "dataset.toml").write_text("\n".join(filter(None, declaration.groups())))
    dataset = open_dataset(config(root))
    assert not any("empty" in note for note in dataset.notes)


def test_soft_edges_are_cut_at_the_declared_threshold(folder: Folder) -> None:
    root = folder(mask=soft)
    (root / "dataset.toml").write_text("classes = { bone = 255 }\nthreshold = 60\n")
    np.testing.assert_array_equal(first_mask(open_dataset(config(root))), soft(0) >= 60)


def test_undeclared_soft_edges_are_refused_with_the_line_to_write(folder: Folder) -> None:
    with pytest.raises(DataError, match=r"classes = \{ foreground = 2\d\d \} and threshold = 128"):
        open_dataset(config(folder(mask=soft)))


def test_an_undeclared_third_value_is_refused_with_the_line_to_write(folder: Folder) -> None:
    root = folder(mask=lambda i: np.array([0, 255, 127], np.uint8)[shapes(i)])
    with pytest.raises(DataError, match=r"classes = \{ foreground = 255 \} with ignore = 127"):
        open_dataset(config(root))


def test_unknown_values_are_reported_for_every_file_with_the_remedy(folder: Folder) -> None:
    root = folder(mask=lambda i: np.array([0, 255, 127 if i in (1, 4) else 0], np.uint8)[shapes(i)])
    with pytest.raises(DataError) as caught:
        open_dataset(config(root, classes={"lung": 255}))
    text = str(caught.value)
    assert "masks/x001.png: undeclared mask value 127" in text
    assert "masks/x004.png: undeclared mask value 127" in text
    assert "masks/x000.png" not in text
    assert "declared are lung = 255" in text
    assert "ignore" in text


def test_a_photograph_is_no_mask(folder: Folder) -> None:
    rng = np.random.default_rng(0)
    root = folder(mask=lambda i: rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8))
    with pytest.raises(DataError, match="masks hold"):
        open_dataset(config(root))


def test_masks_without_any_foreground_are_refused(folder: Folder) -> None:
    with pytest.raises(DataError, match="every mask is empty"):
        open_dataset(config(folder(mask=lambda i: np.zeros(SIZE, np.uint8))))


def test_declared_masks_without_any_foreground_are_refused(folder: Folder) -> None:
    for root in (
        folder(mask=lambda i: (shapes(i) > 0).astype(np.uint8)),
        folder(mask=lambda i: np.zeros(SIZE, np.uint8)),
    ):
        with pytest.raises(DataError, match=r"every mask is empty.*declared are bone = 255, from 128 on"):
            open_dataset(config(root, classes={"bone": 255}, threshold=128))


def test_some_empty_masks_are_a_warning(folder: Folder) -> None:
    root = folder(mask=lambda i: (shapes(i) > 0).astype(np.uint8) * (255 if i else 0))
    assert "warning: 1 empty masks: masks/x000.png" in open_dataset(config(root)).notes


def test_masks_are_turned_upright_like_their_images(folder: Folder, tmp_path: Path) -> None:
    root = folder()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    mask = (shapes(0) > 0).astype(np.uint8) * 255
    for kind, pixels in (("images", mask // 2 + 10), ("masks", mask)):
        save(np.rot90(pixels), root / kind / "x000.png", exif=exif)
    np.testing.assert_array_equal(first_mask(open_dataset(config(root))), shapes(0) > 0)


def test_declarations_that_make_no_sense_are_refused() -> None:
    for classes, ignore, words in (
        ({"a": "green"}, None, "neither a number"),
        ({"a": 70000}, None, "neither a number"),
        ({"a": True}, None, "neither a number"),
        ({"a": 1, "b": 1}, None, "declared 2 times"),
        ({"a": 1}, 1, "declared 2 times"),
        ({"background": 0}, None, "declares only the background"),
        ({"Background": 0}, None, "declares only the background"),
        ({" ": 1}, None, "no name of a class"),
    ):
        with pytest.raises(UserError, match=words):
            declare(classes, ignore)


def test_the_background_is_none_of_the_classes_however_it_is_spelt() -> None:
    for name in ("background", "Background", "_background_"):
        coding = declare({name: 7, "bone": 1})
        assert (coding.names, coding.background) == (("bone",), (7,))


def test_nearest_resizing_makes_no_class_up() -> None:
    mask = np.array([0, 2, IGNORE], np.uint8)[shapes(0)]
    assert set(np.unique(resize_mask(mask, (7, 9)))) <= {0, 2, IGNORE}
    np.testing.assert_array_equal(resize_mask(mask, SIZE), mask)


def test_soft_masks_keep_their_greys(tmp_path: Path) -> None:
    path = save(soft(0), tmp_path / "m.png")
    np.testing.assert_array_equal(read_soft_mask(path, declare({"bone": 255})), soft(0))
    path = save((shapes(0) > 0).astype(np.uint8), tmp_path / "n.png")
    np.testing.assert_array_equal(read_soft_mask(path, declare({"bone": 1})), (shapes(0) > 0) * 255)
