"""Cleaning changes what its rules name and nothing else."""

import numpy as np
import pytest

from pdrunet_jax.data.masks import IGNORE
from pdrunet_jax.predict.postprocess import Cleaning, clean
from pdrunet_jax.runtime.errors import UserError


def scene() -> np.ndarray:
    """Class 1: parts of 36 pixels, with a hole, 9 and 1; class 2: 6 and 4 that touch by a corner, and 1 in the hole."""
    mask = np.zeros((20, 20), np.uint8)
    mask[1:8, 1:7] = 1
    mask[3:5, 3:6] = 0
    mask[10:13, 1:4] = 1
    mask[18, 18] = 1
    mask[10:12, 10:13] = 2
    mask[12:14, 13:15] = 2
    mask[3, 5] = 2
    return mask


def test_nothing_changes_by_default():
    np.testing.assert_array_equal(clean(scene(), Cleaning()), scene())


def test_the_largest_parts_of_each_class_stay():
    expected = scene()
    expected[10:13, 1:4] = expected[18, 18] = expected[3, 5] = 0
    np.testing.assert_array_equal(clean(scene(), Cleaning(largest=1)), expected)
    expected[10:13, 1:4] = 1
    expected[3, 5] = 2
    np.testing.assert_array_equal(clean(scene(), Cleaning(largest=2)), expected)


def test_parts_below_the_minimum_area_go():
    assert (clean(scene(), Cleaning(min_area=10)) == 2).sum() == 10  # parts that touch by a corner count as one
    assert (clean(scene(), Cleaning(min_area=11)) == 2).sum() == 0
    assert (clean(scene(), Cleaning(min_area=10)) == 1).sum() == 36


def test_holes_are_filled_but_not_over_another_class():
    filled = clean(scene(), Cleaning(fill_holes=True))
    assert filled[3, 5] == 2
    assert (filled[3:5, 3:6] == 1).sum() == 5
    np.testing.assert_array_equal(filled[8:], scene()[8:])


def test_a_hole_that_a_small_part_leaves_is_filled():
    cleaned = clean(scene(), Cleaning(largest=1, fill_holes=True))
    assert (cleaned[1:8, 1:7] == 1).all()


def test_a_dent_open_to_the_border_is_no_hole():
    mask = np.ones((5, 5), np.uint8)
    mask[0:3, 2] = 0
    np.testing.assert_array_equal(clean(mask, Cleaning(fill_holes=True)), mask)


def test_ignored_pixels_stay_ignored():
    mask = scene()
    mask[3, 3] = mask[0, 19] = IGNORE
    cleaned = clean(mask, Cleaning(largest=1, min_area=2, fill_holes=True))
    np.testing.assert_array_equal(cleaned == IGNORE, mask == IGNORE)


def test_the_argument_is_left_as_it_is():
    mask = scene()
    clean(mask, Cleaning(largest=1, fill_holes=True))
    np.testing.assert_array_equal(mask, scene())


@pytest.mark.parametrize("rules", [{"largest": -1}, {"min_area": -5}])
def test_negative_numbers_are_refused(rules):
    with pytest.raises(UserError, match="0 or more"):
        Cleaning(**rules)
