from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdrunet_jax.config import AugmentConfig
from pdrunet_jax.data.augment import augment, sample_keys
from pdrunet_jax.data.masks import IGNORE

EVERYTHING = AugmentConfig(
    flip_horizontal=0.5,
    flip_vertical=0.5,
    rotate=20,
    scale=0.2,
    translate=0.1,
    shear=10,
    elastic=2,
    gamma=0.5,
    contrast=0.3,
    brightness=0.1,
    noise=0.05,
    blur=1.5,
)
GEOMETRY = AugmentConfig(
    flip_horizontal=0.5, flip_vertical=0.5, rotate=20, scale=0.2, translate=0.1, shear=10, elastic=2
)


run = jax.jit(augment, static_argnames=("config", "soft", "swapped"))


def keys(count: int, epoch: int = 0, seed: int = 0) -> jax.Array:
    return jax.jit(sample_keys)(jax.random.key(seed), jnp.full(count, epoch), jnp.arange(count))


def noise(count: int, height: int = 24, width: int = 32, channels: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).random((count, height, width, channels)), jnp.float32)


def classes(count: int, height: int = 24, width: int = 32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).integers(0, 3, (count, height, width)), jnp.uint8)


def disc(height: int, width: int, row: float, column: float, radius: float) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return (y - row) ** 2 + (x - column) ** 2 < radius**2


def test_nothing_on_changes_nothing() -> None:
    images, masks = noise(3), classes(3)
    out_images, out_masks = run(images, masks, keys(3), AugmentConfig())
    assert np.array_equal(out_images, images)
    assert np.array_equal(out_masks, masks)


def test_nothing_on_adds_no_work() -> None:
    jaxpr = jax.make_jaxpr(lambda i, m, k: augment(i, m, k, AugmentConfig()))(noise(1), classes(1), keys(1))
    assert jaxpr.eqns == []


@pytest.mark.parametrize(
    ("config", "flip"),
    [
        (AugmentConfig(flip_horizontal=1), lambda a: a[:, :, ::-1]),
        (AugmentConfig(flip_vertical=1), lambda a: a[:, ::-1]),
        (AugmentConfig(flip_horizontal=1, flip_vertical=1), lambda a: a[:, ::-1, ::-1]),
    ],
)
def test_flips_are_exact(config: AugmentConfig, flip: Callable[[np.ndarray], np.ndarray]) -> None:
    images, masks = noise(3, channels=3), classes(3)
    out_images, out_masks = run(images, masks, keys(3), config)
    assert np.array_equal(out_images, flip(np.asarray(images)))
    assert np.array_equal(out_masks, flip(np.asarray(masks)))


@pytest.mark.parametrize("translate", [0.0, 1e-7])
def test_classes_of_either_side_change_places_in_a_mirror_image_and_not_in_a_turned_one(translate: float) -> None:
    images, masks = noise(3), classes(3)
    masks = masks.at[:, 0, 0].set(IGNORE)
    table = np.arange(256, dtype=np.uint8)
    table[:3] = 0, 2, 1
    for horizontal, vertical in ((1, 0), (0, 1), (1, 1)):
        config = AugmentConfig(flip_horizontal=horizontal, flip_vertical=vertical, translate=translate)
        out = run(images, masks, keys(3), config, swapped=(0, 2, 1))[1]
        plain = np.asarray(run(images, masks, keys(3), config)[1])
        assert np.array_equal(out, table[plain] if horizontal != vertical else plain)
        assert out.dtype == np.uint8


def test_flips_come_as_often_as_asked() -> None:
    images = jnp.tile(jnp.asarray([[0.0, 1.0]], jnp.float32)[None, :, :, None], (400, 1, 1, 1))
    out, _ = run(images, jnp.zeros((400, 1, 2), jnp.uint8), keys(400), AugmentConfig(flip_horizontal=0.25))
    assert 0.18 < float(out[:, 0, 0, 0].mean()) < 0.32


def test_flips_inside_the_resampling_equal_exact_flips() -> None:
    images, masks = noise(4), classes(4)
    barely = {"translate": 1e-7}
    out_images, out_masks = run(images, masks, keys(4), AugmentConfig(flip_horizontal=1, flip_vertical=1, **barely))
    assert np.allclose(out_images, images[:, ::-1, ::-1], atol=1e-4)
    assert np.array_equal(out_masks, masks[:, ::-1, ::-1])


@pytest.mark.parametrize("shape", [(48, 64), (33, 20)])
def test_image_and_mask_move_together(shape: tuple[int, int]) -> None:
    """An image that is its own mask stays so, but for the pixels that its edge crosses."""
    height, width = shape
    shapes = [disc(height, width, height * a, width * b, height * c) for a, b, c in ((0.4, 0.6, 0.3), (0.6, 0.3, 0.2))]
    masks = jnp.asarray(np.stack(shapes * 4), jnp.uint8)
    images, moved = run(masks[..., None].astype(jnp.float32), masks, keys(8), GEOMETRY)
    inside = np.asarray(moved) != IGNORE
    picture, label = np.asarray(images[..., 0]), np.asarray(moved)
    assert np.all(label[inside & (picture == 1)] == 1)
    assert np.all(label[inside & (picture == 0)] == 0)
    assert np.mean(inside & (picture > 0) & (picture < 1)) < 0.12
    assert not np.array_equal(label, masks)


def test_bilinear_and_nearest_use_the_same_places() -> None:
    """On a ramp, bilinear gives the source column itself and nearest must round that very number."""
    ramp = jnp.broadcast_to(jnp.arange(64, dtype=jnp.float32)[None, None, :], (4, 64, 64))
    images, masks = run(ramp[..., None] / 64, ramp.astype(jnp.uint8), keys(4), GEOMETRY)
    column, label = np.asarray(images[..., 0]) * 64, np.asarray(masks)
    inside = label != IGNORE
    assert inside.mean() > 0.5
    assert np.all(np.abs(column - label)[inside] <= 0.5 + 1e-3)


def test_a_rotation_turns_about_the_centre_by_at_most_what_is_asked() -> None:
    """A bar through the centre keeps its centre; its direction gives the angle back, also in an oblong image."""
    height, width = 65, 81
    y, x = np.mgrid[:height, :width]
    bar = (np.abs(y - 32) < 2) & (np.abs(x - 40) < 28)
    masks = jnp.asarray(np.stack([bar] * 32), jnp.uint8)
    _, turned = run(masks[..., None].astype(jnp.float32), masks, keys(32), AugmentConfig(rotate=30))
    angles = []
    for mask in np.asarray(turned) == 1:
        rows, columns = np.nonzero(mask)
        assert abs(rows.mean() - 32) < 0.5
        assert abs(columns.mean() - 40) < 0.5
        assert abs(int(mask.sum()) - int(bar.sum())) < 12
        angles.append(np.degrees(np.arctan2(np.cov(rows, columns)[0, 1], columns.var())))
    assert np.max(np.abs(angles)) < 31
    assert np.max(angles) > 15
    assert np.min(angles) < -15


def test_scale_shift_and_shear_stay_within_their_bounds() -> None:
    square = np.zeros((48, 96), bool)
    square[16:32, 40:56] = True
    masks = jnp.asarray(np.stack([square] * 32), jnp.uint8)
    images = masks[..., None].astype(jnp.float32)

    def moved(**options: float) -> np.ndarray:
        return np.asarray(run(images, masks, keys(32), AugmentConfig(**options))[1]) == 1

    areas = moved(scale=0.25).sum((1, 2)) / 256
    assert 1 / 1.25**2 - 0.15 < areas.min() < 0.85
    assert 1.15 < areas.max() < 1.25**2 + 0.15
    for axis, centre, largest in ((0, 23.5, 4.8), (1, 47.5, 9.6)):  # a tenth of each side
        shifts = np.array([np.nonzero(mask)[axis].mean() for mask in moved(translate=0.1)]) - centre
        assert np.abs(shifts).max() < largest + 0.5
        assert shifts.min() < -0.7 * largest
        assert shifts.max() > 0.7 * largest
    sheared = moved(shear=20)
    assert np.abs(sheared.sum((1, 2)) - 256).max() < 24  # a shear keeps areas
    assert np.abs([np.mean(np.nonzero(mask)[1]) - 47.5 for mask in sheared]).max() < 1
    assert len({mask.tobytes() for mask in sheared}) > 4


def test_elastic_displacement_has_the_size_asked_for() -> None:
    ramp = jnp.broadcast_to(jnp.arange(96, dtype=jnp.float32)[None, None, :], (16, 96, 96))
    images, masks = run(ramp[..., None] / 96, ramp.astype(jnp.uint8), keys(16), AugmentConfig(elastic=3))
    displacement = (np.asarray(images[..., 0]) * 96 - np.asarray(ramp))[:, 20:76, 20:76]
    assert 2 < displacement.std() < 4
    steps = np.abs(np.diff(displacement, axis=1)).max()
    assert steps < 2  # smooth: neighbours move together
    assert np.all(masks[:, 40:56, 40:56] != IGNORE)


def test_the_outside_is_black_and_ignored() -> None:
    images, masks = jnp.ones((8, 32, 32, 2), jnp.float32), jnp.ones((8, 32, 32), jnp.uint8)
    out_images, out_masks = run(images, masks, keys(8), AugmentConfig(rotate=45))
    outside = np.asarray(out_masks) == IGNORE
    assert 0.02 < outside.mean() < 0.3
    assert np.all(np.asarray(out_images)[outside] == 0)
    assert np.all(np.asarray(out_images)[~outside] == pytest.approx(1))


def test_soft_masks_are_interpolated_and_black_outside() -> None:
    ramp = jnp.broadcast_to(jnp.arange(0, 256, 4, dtype=jnp.float32)[None, None, :], (6, 32, 64))
    images, masks = run(ramp[..., None] / 255, ramp.astype(jnp.uint8), keys(6), GEOMETRY, soft=True)
    assert masks.dtype == jnp.uint8
    assert np.abs(np.asarray(images[..., 0]) * 255 - np.asarray(masks)).max() <= 0.51
    assert len(np.unique(masks)) > 100


def test_ignored_pixels_stay_ignored() -> None:
    masks = jnp.full((4, 32, 32), IGNORE, jnp.uint8)
    assert np.all(run(noise(4, 32, 32), masks, keys(4), GEOMETRY)[1] == IGNORE)


def test_intensities_change_within_their_bounds() -> None:
    images, masks = jnp.full((64, 8, 8, 1), 0.5, jnp.float32), jnp.zeros((64, 8, 8), jnp.uint8)

    def changed(source: jax.Array = images, **options: float) -> np.ndarray:
        out, same = run(source, masks, keys(64), AugmentConfig(**options))
        assert np.array_equal(same, masks)
        assert np.all((out >= 0) & (out <= 1))
        return np.asarray(out)

    gamma = changed(gamma=1)
    assert 0.25 <= gamma.min() < 0.35
    assert 0.6 < gamma.max() <= 0.5**0.5
    brightness = changed(brightness=0.2)
    assert 0.3 <= brightness.min() < 0.35
    assert 0.65 < brightness.max() <= 0.7
    assert np.allclose(changed(contrast=0.5), 0.5, atol=1e-6)  # contrast keeps the mean
    grain = changed(noise=0.1).std(axis=(1, 2, 3))
    assert grain.min() < 0.02
    assert 0.08 < grain.max() < 0.13
    assert np.allclose(changed(blur=2), 0.5, atol=1e-5)  # blur keeps the sum, at the edges too
    textured = jnp.tile(noise(1, 8, 8), (64, 1, 1, 1))
    spread = changed(textured, contrast=0.5).std(axis=(1, 2, 3)) / float(textured.std())
    assert 0.5 < spread.min() < 0.65
    assert spread.max() > 1.1
    assert changed(textured, blur=2).std(axis=(1, 2, 3)).min() < 0.5 * float(textured.std())


def test_blur_has_the_deviation_drawn() -> None:
    """A point becomes a Gaussian of the drawn width, at most the one asked for."""
    point = jnp.zeros((32, 41, 41, 1), jnp.float32).at[:, 20, 20].set(1)
    out, _ = run(point, jnp.zeros((32, 41, 41), jnp.uint8), keys(32), AugmentConfig(blur=3))
    line = np.asarray(out[..., 0]).sum(axis=1)
    widths = np.sqrt((line * (np.arange(41) - 20) ** 2).sum(axis=1))
    assert widths.max() < 3.01
    assert widths.max() > 2.4
    assert widths.min() < 0.6


def test_draws_depend_on_the_sample_and_not_on_its_place_in_the_batch() -> None:
    images, masks, order = noise(4), classes(4), np.array([2, 0, 3, 1])
    straight = run(images, masks, keys(4), EVERYTHING)
    shuffled = run(images[order], masks[order], keys(4)[order], EVERYTHING)
    assert np.array_equal(shuffled[0], straight[0][order])
    assert np.array_equal(shuffled[1], straight[1][order])
    alone = run(images[2:3], masks[2:3], keys(4)[2:3], EVERYTHING)
    assert np.allclose(alone[0], straight[0][2:3], atol=1e-5)
    assert np.array_equal(alone[1], straight[1][2:3])


def test_epoch_seed_and_index_each_change_the_draw() -> None:
    image, mask = noise(1), classes(1)
    seen = {
        np.asarray(
            run(image, mask, sample_keys(jax.random.key(seed), jnp.array([epoch]), jnp.array([index])), EVERYTHING)[0]
        ).tobytes()
        for seed, epoch, index in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    }
    assert len(seen) == 4


def test_one_option_leaves_the_draws_of_the_others_alone() -> None:
    images, masks = noise(4), classes(4)
    alone = run(images, masks, keys(4), AugmentConfig(rotate=20))[1]
    together = run(images, masks, keys(4), AugmentConfig(rotate=20, gamma=0.5, noise=0.1, blur=1))[1]
    assert np.array_equal(alone, together)


def test_a_new_batch_is_not_traced_again() -> None:
    traces = 0

    @jax.jit
    def step(images: jax.Array, masks: jax.Array, epoch: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        nonlocal traces
        traces += 1
        return augment(images, masks, sample_keys(jax.random.key(0), epoch, index), EVERYTHING)

    for epoch in range(3):
        out = step(noise(2), classes(2), jnp.full(2, epoch, jnp.int32), jnp.arange(2, dtype=jnp.int32))
    assert traces == 1
    assert out[0].dtype == jnp.float32
    assert out[1].dtype == jnp.uint8


def test_double_precision_sees_the_same_draws() -> None:
    images, masks = noise(3), classes(3)
    single = run(images, masks, keys(3), EVERYTHING)
    with jax.enable_x64(True):
        double = run(images.astype(jnp.float64), masks, keys(3), EVERYTHING)
    assert double[0].dtype == np.float64
    assert np.abs(np.asarray(double[0]) - np.asarray(single[0])).max() < 1e-3
    assert np.mean(np.asarray(double[1]) != np.asarray(single[1])) < 0.01
