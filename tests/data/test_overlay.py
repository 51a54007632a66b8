import numpy as np
import pytest
from PIL import Image

from pdrunet_jax.data import overlay as pictures
from pdrunet_jax.data.masks import IGNORE

GREY = np.full((30, 40), 100, np.uint8)


def test_an_overlay_tints_the_inside_outlines_the_edge_and_leaves_the_rest():
    mask = np.zeros((30, 40), np.uint8)
    mask[10:20, 10:20] = 2
    drawn = pictures.overlay(GREY, mask)
    colour = np.array(pictures.COLOURS[1])
    np.testing.assert_array_equal(drawn[10, 10:20], np.tile(colour, (10, 1)))
    np.testing.assert_allclose(drawn[15, 15], 0.7 * 100 + 0.3 * colour, atol=1)
    assert (drawn[0] == 100).all()


def test_a_difference_shows_missed_extra_and_confused_and_no_ignored_pixel():
    truth, prediction = np.zeros((30, 40), np.uint8), np.zeros((30, 40), np.uint8)
    truth[0:5], prediction[5:10], truth[10:15], prediction[10:15], truth[15:20] = 1, 1, 1, 2, IGNORE
    prediction[15:20] = 1
    drawn = pictures.difference(GREY, truth, prediction).astype(int)
    for row, colour in ((2, pictures.MISSED), (7, pictures.EXTRA), (12, pictures.CONFUSED)):
        assert np.abs(drawn[row, 5] - colour).max() < 40
    assert np.ptp(drawn[17, 5]) == np.ptp(drawn[25, 5]) == 0  # grey


def test_an_outline_is_inside_its_region_and_not_on_the_pictures_edge():
    region = np.zeros((10, 10), bool)
    region[:, :5] = True
    edge = pictures.outline(region, 2)
    np.testing.assert_array_equal(edge, np.tile([0, 0, 0, 1, 1, 0, 0, 0, 0, 0], (10, 1)).astype(bool))


def test_a_sheet_has_a_row_for_each_case_of_whatever_size():
    cases = [np.zeros((20, 40), np.uint8), np.zeros((64, 32), np.uint8)]
    images = [np.zeros((20, 40, 1), np.uint8), np.zeros((64, 32, 3), np.float32)]
    sheet = pictures.sample_sheet(images, cases, cases, ["one", "x" * 500])
    assert sheet.width > 4 * 256
    assert sheet.height > 128 + 256
    with pytest.raises(ValueError, match="shorter"):
        pictures.sample_sheet(images, cases, cases, ["one"])


def test_an_index_mask_reads_back_as_indices(tmp_path):
    mask = np.arange(12, dtype=np.uint8).reshape(3, 4)
    pictures.save(pictures.index_mask(mask, 11), tmp_path / "m.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "m.png")), mask)
    assert [path.name for path in tmp_path.iterdir()] == ["m.png"]
