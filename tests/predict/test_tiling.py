"""Tiles give the logits of the whole image, and the windows that they are made of cover every pixel once."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdrunet_jax.model.network import PDRUNet
from pdrunet_jax.predict.inference import forward, forward_in_tiles
from pdrunet_jax.predict.tiling import MULTIPLE, in_tiles, windows
from pdrunet_jax.runtime.errors import UserError
from tests.support.tiny import brightness_model, network

RADIUS = 316


def lively_model() -> PDRUNet:
    """Two filters whose activations neither die nor explode, so that the whole receptive field counts."""
    model = network(filters=2, norm="none", dropout=0.0)
    for name, block in vars(model).items():
        if hasattr(block, "second"):
            for number, conv in enumerate((block.first, block.second)):
                shape = conv.kernel[...].shape
                draw = np.random.default_rng(len(name) + number).random(shape, np.float32)
                conv.kernel.set_value(jnp.asarray(draw / draw.sum(axis=(0, 1, 2))))
                conv.bias.set_value(jnp.zeros(shape[-1]) - 0.05)
    model.final_conv.kernel.set_value(jnp.full_like(model.final_conv.kernel[...], 0.1))
    return model


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (1, height, width, 1), np.uint8)


@pytest.mark.parametrize(
    ("length", "core", "halo", "multiple"),
    [(2000, 256, 316, 1), (1500, 100, 316, 1), (700, 1, 316, 1), (97, 7, 4, 1), (1999, 100, 152, 16), (999, 9, 9, 64)],
)
def test_windows_cover_every_pixel_once_and_keep_their_halo(length, core, halo, multiple):
    found = windows(length, core, halo, multiple)
    assert len(found) > 1
    assert len({window.stop - window.start for window in found[:-1]}) == 1
    assert 0 <= (found[-1].stop - found[-1].start) - (found[0].stop - found[0].start) < multiple
    assert not any(window.start % multiple for window in found)
    assert (found[0].stop - found[0].start) % MULTIPLE == 0
    covered = [pixel for window in found for pixel in range(window.first, window.last)]
    assert covered == list(range(length))
    for window in found:
        assert window.start >= 0
        assert window.stop <= length
        assert window.first - window.start >= halo or window.start == 0
        assert window.stop - window.last >= halo or window.stop == length


def test_an_axis_that_fits_is_one_window():
    assert windows(600, 256, 316) == [(0, 600, 0, 600)]


def test_the_radius_is_how_far_a_logit_sees():
    model = brightness_model()
    assert model.radius == RADIUS
    for block in vars(model).values():
        if hasattr(block, "second"):
            for conv in (block.first, block.second):
                conv.kernel.set_value(jnp.full_like(conv.kernel[...], 1 / 9))
    side = 2 * RADIUS + 41
    seen = jax.grad(lambda image: model(image)[0, side // 2, side // 2, 0])(jnp.ones((1, side, side, 1)))
    rows, columns = np.nonzero(np.asarray(seen)[0, :, :, 0])
    for found in (rows, columns):
        assert (found.min(), found.max()) == (side // 2 - RADIUS, side // 2 + RADIUS)


def test_tiles_give_the_logits_of_the_whole_image_and_a_smaller_halo_does_not():
    model, images = lively_model(), noise(736, 704)
    whole = np.asarray(forward(model, images))
    assert whole.std() > 1e-3
    tiled = forward_in_tiles(model, images, 32)
    assert len(windows(736, 32, RADIUS)) * len(windows(704, 32, RADIUS)) == 6
    np.testing.assert_allclose(tiled, whole, atol=1e-5 * np.abs(whole).max())
    approximate = forward_in_tiles(model, images, 32, halo=32)
    assert np.abs(approximate - whole).max() > 1e-3 * np.abs(whole).max()


@pytest.mark.parametrize(("name", "down", "up"), [("unet", "max", "transposed"), ("fusionnet", "stride", "bilinear")])
def test_tiles_of_networks_that_halve_the_resolution_begin_where_the_whole_image_is_divided(name, down, up):
    model, images = network(name=name, filters=3, depth=2, down=down, up=up, init="he"), noise(203, 40)
    whole = np.asarray(forward(model, images))
    scale = whole.std()
    np.testing.assert_allclose(forward_in_tiles(model, images, 8), whole, atol=1e-4 * scale)
    shifted = in_tiles(partial(forward, model), images, 8, model.radius + 1, 1)
    assert np.abs(shifted - whole).max() > 1e-2 * scale


def test_tiles_of_a_network_that_sees_the_size_of_the_image_are_refused():
    with pytest.raises(UserError, match="bilinear_corners"):
        forward_in_tiles(network(name="unet", filters=1, depth=1, up="bilinear_corners"), noise(8, 8), 4)


def test_all_tiles_have_one_shape():
    shapes = []

    def network(tile: np.ndarray) -> np.ndarray:
        shapes.append(tile.shape)
        return tile.astype(np.float32)

    images = noise(130, 100)
    np.testing.assert_array_equal(in_tiles(network, images, 24, halo=4), images)
    assert set(shapes) == {(1, 32, 32, 1)}
    assert len(shapes) > 15


@pytest.mark.parametrize(("core", "halo"), [(0, 4), (8, -1)])
def test_impossible_tiles_are_refused(core, halo):
    with pytest.raises(ValueError, match="at least"):
        in_tiles(partial(forward, brightness_model()), noise(8, 8), core, halo)
