import math

import numpy as np
import pytest
from scipy import ndimage

from pdrunet_jax.evaluate.surface import Distances, _boundary, area_error, distances
from tests.support.tiny import blobs

ANISOTROPIC = (0.3, 0.7)


def square(top: int, left: int, side: int = 10, shape: tuple[int, int] = (40, 50)) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[top : top + side, left : left + side] = True
    return mask


def disc(radius: float, size: int = 121) -> np.ndarray:
    row, column = np.mgrid[:size, :size] - size // 2
    return row**2 + column**2 <= radius**2


def values(result: Distances) -> list[float]:
    return [result.hd95, result.assd, result.nsd]


def test_the_boundary_is_what_touches_background_sideways_or_the_border_of_the_image():
    mask = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]], bool)
    expected = np.array([[1, 1, 1, 0], [1, 0, 0, 1], [1, 0, 0, 1], [0, 1, 1, 1]], bool)
    np.testing.assert_array_equal(_boundary(mask), expected)


@pytest.mark.parametrize("seed", range(5))
def test_the_boundary_is_what_an_erosion_by_a_cross_removes(seed):
    mask = blobs(np.random.default_rng(seed), (31, 23))
    np.testing.assert_array_equal(_boundary(mask), mask ^ ndimage.binary_erosion(mask))


def test_equal_masks_are_perfect():
    assert values(distances(square(3, 4), square(3, 4), tolerance=0)) == [0, 0, 1]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_square_shifted_by_k_columns_has_the_distances_on_paper(k):
    result = distances(square(5, 5), square(5, 5 + k), tolerance=0)
    # A square of side 10 has 36 boundary pixels. The k columns of one square outside the other have two rows with
    # distances 1 to k, and 8 more edge pixels at distance k. The opposite edge is inside the other square: its 8 inner
    # pixels are k from that square's edge, or closer to its top or bottom row. All others lie on the other boundary.
    sticking_out = 2 * sum(range(1, k + 1)) + 8 * k
    inner_edge = sum(min(k, row, 9 - row) for row in range(1, 9))
    assert result.hd95 == k
    assert result.assd == pytest.approx((sticking_out + inner_edge) / 36)
    assert result.nsd == pytest.approx((36 - 2 * k - 8 - 8) / 36)
    assert distances(square(5, 5), square(5, 5 + k), tolerance=k).nsd == 1


def test_single_pixels_are_as_far_apart_as_pythagoras_says():
    result = distances(square(2, 3, 1), square(12, 33, 1), spacing=ANISOTROPIC, tolerance=20)
    apart = math.hypot(10 * 0.3, 30 * 0.7)
    assert [result.hd95, result.assd] == pytest.approx([apart] * 2, rel=1e-15)
    assert result.nsd == 0
    assert distances(square(2, 3, 1), square(12, 33, 1), spacing=ANISOTROPIC, tolerance=21.3).nsd == 1


def test_hd95_is_the_larger_of_the_two_directions_and_not_the_percentile_of_both_together():
    truth = square(0, 0, 1)
    prediction = np.zeros_like(truth)
    prediction[0, :41] = True  # distances 0 to 40 in one direction, one 0 in the other
    assert distances(prediction, truth, tolerance=0).hd95 == pytest.approx(38)
    assert np.percentile([*range(41), 0], 95) == pytest.approx(37.95)


def test_assd_weighs_every_boundary_pixel_alike_and_not_the_two_directions():
    prediction = np.zeros((5, 9), bool)
    prediction[2, :9] = True
    truth = np.zeros_like(prediction)
    truth[2, 0] = True
    assert distances(prediction, truth, tolerance=0).assd == pytest.approx(sum(range(9)) / 10)


@pytest.mark.parametrize(("small", "large"), [(20, 25), (30, 42), (10, 55)])
def test_concentric_discs_are_apart_by_the_difference_of_their_radii(small, large):
    result = distances(disc(small), disc(large), tolerance=large - small + 1)
    for value in (result.hd95, result.assd):
        assert value == pytest.approx(large - small, abs=1)
    assert result.nsd == 1
    assert distances(disc(small), disc(large), tolerance=large - small - 1.5).nsd == 0


def test_a_tolerance_is_met_by_a_distance_equal_to_it_but_for_rounding():
    assert math.hypot(3 * 0.1, 0) > 0.3
    pixels = square(2, 2, 1), square(5, 2, 1)
    assert distances(*pixels, spacing=(0.1, 0.1), tolerance=0.3).nsd == 1
    assert distances(*pixels, spacing=(0.1, 0.1), tolerance=0.2999).nsd == 0


def test_two_empty_masks_have_no_score_and_one_empty_mask_has_no_distance_but_surface_dice_0():
    nothing, something = np.zeros((40, 50), bool), square(3, 3)
    assert all(math.isnan(value) for value in values(distances(nothing, nothing, tolerance=1)))
    for pair in ((nothing, something), (something, nothing)):
        result = distances(*pair, tolerance=1)
        assert result.nsd == 0
        assert all(math.isnan(value) for value in (result.hd95, result.assd))


@pytest.mark.parametrize("seed", range(10))
def test_swapping_the_masks_changes_no_bit(seed):
    rng = np.random.default_rng(seed)
    pair = blobs(rng, (41, 30)), blobs(rng, (41, 30))
    assert distances(*pair, spacing=ANISOTROPIC, tolerance=1) == distances(
        *pair[::-1], spacing=ANISOTROPIC, tolerance=1
    )


@pytest.mark.parametrize("seed", range(10))
def test_background_around_the_masks_changes_nothing(seed):
    rng = np.random.default_rng(seed)
    pair = blobs(rng, (41, 30)), blobs(rng, (41, 30))
    padded = [np.pad(mask, ((3, 17), (8, 0))) for mask in pair]
    assert distances(*pair, spacing=ANISOTROPIC, tolerance=1) == distances(*padded, spacing=ANISOTROPIC, tolerance=1)


@pytest.mark.parametrize("seed", range(10))
def test_twice_the_spacing_doubles_every_distance(seed):
    rng = np.random.default_rng(seed)
    pair = blobs(rng, (41, 30)), blobs(rng, (41, 30))
    once = distances(*pair, spacing=ANISOTROPIC, tolerance=1)
    twice = distances(*pair, spacing=(0.6, 1.4), tolerance=2)
    assert twice == Distances(hd95=2 * once.hd95, assd=2 * once.assd, nsd=once.nsd)


def test_distances_are_those_of_every_pair_of_boundary_pixels():
    rng = np.random.default_rng(7)
    pair = blobs(rng, (23, 31)), blobs(rng, (23, 31))
    points = [np.argwhere(_boundary(mask)) * ANISOTROPIC for mask in pair]
    table = np.linalg.norm(points[0][:, None] - points[1][None], axis=-1)
    there, back = table.min(axis=1), table.min(axis=0)
    both = np.concatenate([there, back])
    expected = [
        max(np.percentile(there, 95), np.percentile(back, 95)),
        both.mean(),
        (both <= 0.65).mean(),
    ]
    assert values(distances(*pair, spacing=ANISOTROPIC, tolerance=0.65)) == pytest.approx(expected, rel=1e-13)


def test_an_edge_that_both_masks_share_where_pixels_are_ignored_counts_as_right():
    truth, valid = square(5, 5), np.ones((40, 50), bool)
    valid[:, 12:] = False
    prediction = truth | square(8, 12, 20)
    assert distances(prediction & valid, truth & valid, tolerance=0) == Distances(0, 0, 1)
    assert distances(prediction, truth, tolerance=0).hd95 > 10
    taller = square(4, 5) | truth
    cut = distances(taller & valid, truth & valid, tolerance=0)
    assert cut.nsd > distances(taller, truth, tolerance=0).nsd


def test_the_area_error_is_signed_and_relative_to_the_truth():
    nothing, small, large = np.zeros((40, 50), bool), square(1, 1, 4), square(20, 20, 8)
    assert area_error(large, small) == 3
    assert area_error(small, large) == -0.75
    assert area_error(nothing, small) == -1
    assert area_error(small, np.roll(small, 5, axis=0)) == 0
    assert math.isnan(area_error(small, nothing))
    assert math.isnan(area_error(nothing, nothing))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"truth": np.ones((4, 5), bool)}, r"prediction is bool \(4, 4\), truth bool \(4, 5\)"),
        ({"prediction": np.ones((1, 4, 4), bool)}, r"prediction is bool \(1, 4, 4\)"),
        ({"truth": np.ones((4, 4), np.uint8)}, "truth uint8"),
        ({"tolerance": -0.1}, "tolerance is -0.1"),
        ({"tolerance": math.nan}, "tolerance is nan"),
        ({"tolerance": math.inf}, "tolerance is inf"),
        ({"spacing": (0.1, 0.0)}, "spacing is .* two positive numbers"),
        ({"spacing": (-0.1, 0.1)}, "spacing is .* two positive numbers"),
        ({"spacing": (0.1, math.nan)}, "spacing is .* two positive numbers"),
        ({"spacing": (0.1, 0.1, 0.1)}, "spacing is .* two positive numbers"),
    ],
)
def test_input_that_makes_no_sense_is_refused_with_its_reason(changes, message):
    arguments = {"prediction": np.ones((4, 4), bool), "truth": np.ones((4, 4), bool), "tolerance": 1.0, **changes}
    with pytest.raises(ValueError, match=message):
        distances(**arguments)


def test_areas_of_masks_of_different_shapes_are_not_compared():
    with pytest.raises(ValueError, match="of one shape"):
        area_error(np.ones((4, 4), bool), np.ones((4, 5), bool))
