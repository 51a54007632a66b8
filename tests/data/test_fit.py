"""Images of any proportions keep them with `data.fit = pad`, and padding counts nowhere."""

import csv
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from pdrunet_jax import config as config_io
from pdrunet_jax.config import AugmentConfig, DataConfig
from pdrunet_jax.data.augment import augment, sample_keys
from pdrunet_jax.data.dataset import open_dataset
from pdrunet_jax.data.fit import Box, Fit
from pdrunet_jax.data.masks import PADDING
from pdrunet_jax.data.pipeline import eval_batches
from pdrunet_jax.evaluate.__main__ import main as evaluate
from pdrunet_jax.model.load import load_model
from pdrunet_jax.predict.__main__ import main as predict
from pdrunet_jax.predict.inference import segment
from pdrunet_jax.runtime.errors import DataError, UserError
from pdrunet_jax.train.final import weights_options
from pdrunet_jax.train.losses import make_loss
from pdrunet_jax.train.step import build_model, create_state, make_eval_step, targets
from pdrunet_jax.train.validate import Validation
from tests.support.small_data import write_dicom
from tests.support.tiny import brightness_model, save_image, save_model

SHAPES = ((96, 12), (32, 32), (12, 96), (40, 30))
"""Height and width: a whole leg of 8:1, a chest, ..."""


def pixels(number: int, height: int, width: int) -> np.ndarray:
    """Noise that no other number gives, dark around a bright rectangle."""
    drawn = np.random.default_rng(number).integers(0, 60, (height, width), dtype=np.uint8)
    drawn[height // 4 : height // 2, width // 4 : 3 * width // 4] += 180
    return drawn


def dataset(root: Path, shapes: tuple[tuple[int, int], ...] = SHAPES, spacings: tuple[str, ...] = ()) -> Path:
    """Write bright rectangles with their masks, all in the test split; `spacings` go into the manifest."""
    rows = []
    for number, (height, width) in enumerate(shapes):
        image = pixels(number, height, width)
        save_image(root / f"images/{number}.png", image)
        save_image(root / f"masks/{number}.png", np.where(image > 128, 255, 0))
        rows.append(
            [f"images/{number}.png", f"masks/{number}.png", f"p{number}", "test", *spacings[number : number + 1]]
        )
    with (root / "manifest.csv").open("w", newline="") as file:
        head = ["image", "mask", "patient", "split", *(["spacing"] if spacings else [])]
        csv.writer(file).writerows([head, *rows])
    return root


def test_pad_keeps_the_ratio_of_the_sides_and_stretch_does_not() -> None:
    size = (64, 32)
    assert [Fit(size, "pad").box(shape) for shape in ((128, 32), (16, 64), (32, 16), (5, 1000))] == [
        Box(0, 8, 64, 16),
        Box(28, 0, 8, 32),
        Box(0, 0, 64, 32),
        Box(31, 0, 1, 32),
    ]
    assert Fit(size).box((128, 32)) == Box(0, 0, 64, 32)
    fit, image = Fit(size, "pad"), np.full((128, 32, 1), 200, np.uint8)
    placed, mask = fit.image(image), fit.mask(np.ones((128, 32), np.uint8))
    np.testing.assert_array_equal(placed[..., 0] == 200, mask == 1)
    np.testing.assert_array_equal(placed[..., 0] == 0, mask == PADDING)
    assert fit.box(image.shape).crop(mask).all()
    assert (mask == 1).sum() == 64 * 16


def test_a_fixed_spacing_sets_the_scale_and_refuses_what_it_cannot_bring_to_it() -> None:
    fit = Fit((64, 64), "pad", 0.5)
    assert fit.box((100, 40), (0.25, 0.5)) == Box(7, 12, 50, 40)
    with pytest.raises(UserError, match="pixel spacing is unknown"):
        fit.box((100, 40))
    with pytest.raises(UserError, match=r"100 x 40 pixels, more than the 64 x 64"):
        fit.box((100, 40), (0.5, 0.5))


@pytest.mark.parametrize("soft", [False, True])
def test_settings_that_contradict_each_other_are_refused(soft: bool) -> None:
    data = {"fit": "pad", "soft_masks": True} if soft else {"spacing": 0.3}
    with pytest.raises(DataError, match="no value for padding" if soft else "set data.fit = pad"):
        config_io.from_dict({"data": data}, "test")


def test_cached_and_uncached_batches_are_the_same_and_padded(tmp_path: Path) -> None:
    root = dataset(tmp_path)
    batches = []
    for cache in ("memory", "none"):
        config = DataConfig(root=str(root), size=(32,), fit="pad", cache=cache, threads=1)
        batches += eval_batches(open_dataset(config), "test", config, batch_size=4, channels=1)
    for name in ("image", "mask"):
        np.testing.assert_array_equal(batches[0][name], batches[1][name])
    inside = batches[0]["mask"] != PADDING
    assert inside.sum(axis=(1, 2)).tolist() == [32 * 4, 32 * 32, 32 * 4, 32 * 24]
    assert not batches[0]["image"][~inside].any()


def test_padding_is_offered_where_images_are_squeezed(tmp_path: Path) -> None:
    config = DataConfig(root=str(dataset(tmp_path)), size=(32,), threads=1)
    assert any("squeezes 2 of 4 images" in note and "data.fit = pad" in note for note in open_dataset(config).notes)
    assert not any("squeezes" in note for note in open_dataset(replace(config, fit="pad")).notes)


def test_a_size_of_the_shape_of_long_images_is_offered_where_they_are_padded(tmp_path: Path) -> None:
    long = str(dataset(tmp_path / "long", ((150, 50), (150, 52), (150, 54))))
    mixed = str(dataset(tmp_path / "mixed", ((150, 50), (50, 150), (60, 60))))

    def offered(config: DataConfig) -> list[str]:
        return [note for note in open_dataset(replace(config, threads=1)).notes if "with black" in note]

    (note,) = offered(DataConfig(root=long, size=(96,), fit="pad"))
    assert "fills 65% of 96x96" in note
    assert "--data.size 160 64" in note
    assert not offered(DataConfig(root=long, size=(160, 64), fit="pad"))
    assert not offered(DataConfig(root=long, size=(96,)))
    assert not offered(DataConfig(root=mixed, size=(96,), fit="pad"))


def test_padding_stays_black_and_leaves_the_image_as_if_it_were_alone() -> None:
    grey = AugmentConfig(gamma=0.5, contrast=0.3, brightness=0.2)
    image = jnp.asarray(np.random.default_rng(0).random((3, 24, 8, 1)), jnp.float32)
    wide = jnp.pad(image, ((0, 0), (0, 0), (8, 8), (0, 0)))
    mask = jnp.pad(jnp.ones((3, 24, 8), jnp.uint8), ((0, 0), (0, 0), (8, 8)), constant_values=PADDING)
    keys = sample_keys(jax.random.key(0), jnp.zeros(3, int), jnp.arange(3))
    run = jax.jit(augment, static_argnames=("config", "padded"))
    alone, _ = run(image, mask[:, :, 8:16], keys, grey)
    padded, _ = run(wide, mask, keys, grey, padded=True)
    np.testing.assert_allclose(padded[:, :, 8:16], alone, atol=1e-6)
    assert not padded[:, :, :8].any()
    turned = AugmentConfig(rotate=40, translate=0.2, scale=0.3, brightness=0.3, noise=0.1, blur=1.0)
    pictures, masks = run(wide, mask, keys, turned, padded=True)
    assert set(np.unique(masks)) == {1, PADDING}  # what comes from outside is padding, too
    assert not np.asarray(pictures)[np.asarray(masks) == PADDING].any()


def test_padding_counts_in_no_loss_and_no_score() -> None:
    config = config_io.from_dict(
        {
            "data": {"fit": "pad"},
            "model": {"name": "unet", "depth": 1, "filters": 4, "dropout": 0.0},
            "train": {"steps": 2},
        },
        "test",
    )
    graphdef, state = create_state(config, build_model(config, 1))
    random = np.random.default_rng(0)
    mask = np.full((2, 16, 16), PADDING, np.uint8)
    mask[:, :, 4:8] = random.integers(0, 2, (2, 16, 4))
    batch = {"image": random.integers(0, 256, (2, 16, 16, 1), dtype=np.uint8), "mask": mask}
    result = make_eval_step(config, graphdef, 1)(state.params, state.stats, batch)
    assert all(sum(int(result[name][row, 0]) for name in ("tp", "fp", "fn", "tn")) == 16 * 4 for row in range(2))
    # Whatever the mask says there: only valid pixels count.
    target, valid = targets(jnp.asarray(mask), outputs=1, soft=False, dtype=jnp.float32)
    loss = make_loss(config.loss, 1)
    logits = jnp.asarray(random.normal(size=(2, 16, 16, 1)), jnp.float32)
    other = jnp.where(valid[..., None], logits, 5.0)
    assert float(loss(logits, target, valid)) == float(loss(other, jnp.where(valid, target, 1), valid))
    assert valid.sum() == 2 * 16 * 4


def test_validation_pictures_are_drawn_without_padding() -> None:
    fit = Fit((64, 64), "pad")
    image = fit.image(np.full((64, 16, 1), 200, np.uint8))
    truth = fit.mask(np.ones((64, 16), np.uint8))
    shown = Validation(0.0, 1.0, 1.0, ((image, truth, np.ones((64, 64), np.uint8), "x"),))
    padded = Validation(0.0, 1.0, 1.0, ((image, np.ones_like(truth), np.ones((64, 64), np.uint8), "x"),))
    assert shown.sheet().width < padded.sheet().width / 2
    (picture,) = shown.pictures()
    assert picture.truth.sum() == picture.prediction.sum() == 64 * 16


def test_prediction_and_evaluation_follow_what_the_weights_state(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    weights = save_model(
        brightness_model(), tmp_path / "w.safetensors", size=[96], fit="pad", class_names=["foreground"]
    )
    for height, width in SHAPES:
        image = pixels(0, height, width)
        result = segment(load_model(weights), image, augmentation="flips")
        assert (result.mask == (image > 128)).mean() > 0.97
    root = dataset(tmp_path / "data")
    evaluate(["--weights", str(weights), "--data.root", str(root), "--output", str(tmp_path / "e")])
    padded = float(capsys.readouterr().out.splitlines()[-1].split()[2])
    assert padded > 0.95
    summary = (tmp_path / "e" / "summary.json").read_text()
    assert '"fit": "pad"' in summary


def test_a_model_of_a_fixed_spacing_runs_where_the_spacing_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    weights = save_model(
        brightness_model(), tmp_path / "w.safetensors", size=[64], fit="pad", spacing=0.5, class_names=["foreground"]
    )
    model = load_model(weights)
    image = pixels(0, 40, 30)
    with pytest.raises(UserError, match="spacing is unknown"):
        segment(model, image)
    with pytest.raises(UserError, match=r"trained at 0\.5 mm per pixel"):
        segment(model, image, size="own", spacing=(0.5, 0.5))
    np.testing.assert_array_equal(segment(model, image, spacing=(0.5, 0.5)).mask, image > 128)  # no resampling at all
    # The command takes the file's spacing first, --spacing where there is none.
    save_image(tmp_path / "in/a.png", image)
    write_dicom(tmp_path / "in/b.dcm", image.astype(np.uint16) * 16, PixelSpacing=[0.5, 0.25])
    words = ["--weights", str(weights), "--no-overlay", "--output"]
    predict([str(tmp_path / "in"), *words, str(tmp_path / "out"), "--spacing", "0.5"])
    with (tmp_path / "out/areas.csv").open() as file:
        areas = {row["image"]: (int(row["pixels"]), float(row["area_mm2"])) for row in csv.DictReader(file)}
    assert areas["a.png"] == ((image > 128).sum(), (image > 128).sum() * 0.25)
    assert areas["b.dcm"][1] == areas["b.dcm"][0] * 0.125
    capsys.readouterr()
    with pytest.raises(UserError, match=r"--spacing 0\.5 -1"):
        predict([str(tmp_path / "in"), *words, str(tmp_path / "out"), "--spacing", "0.5", "-1"])


def test_spacing_comes_from_the_manifest_then_dataset_toml(tmp_path: Path) -> None:
    def config(root: Path) -> DataConfig:
        return DataConfig(root=str(root), size=(64,), fit="pad", spacing=0.5, threads=1)

    root = dataset(tmp_path / "a", spacings=("0.25 0.5", "1", "", ""))
    with pytest.raises(DataError) as error:
        open_dataset(config(root))
    assert len(error.value.problems) == 2
    assert all("spacing is unknown" in problem for problem in error.value.problems)
    assert error.value.problems[0].startswith("images/2.png")
    (root / "dataset.toml").write_text("spacing = 0.3\n")
    opened = open_dataset(config(root))
    assert [opened.spacing_of(sample) for sample in opened.samples] == [(0.25, 0.5), (1, 1), (0.3, 0.3), (0.3, 0.3)]
    (batch,) = eval_batches(opened, "test", config(root), batch_size=4, channels=1)
    inside = (batch["mask"] != PADDING).sum(axis=(1, 2)).tolist()
    assert inside == [48 * 12, 64 * 64, 7 * 58, 24 * 18]
    wrong = dataset(tmp_path / "b", spacings=("0.25 0.5 1", "x", "0", "-1"))
    with pytest.raises(DataError) as error:
        open_dataset(config(wrong))
    assert [problem.split(": ")[0] for problem in error.value.problems] == [
        f"manifest.csv line {n}" for n in (2, 3, 4, 5)
    ]


def test_weights_keep_the_fit_and_refuse_a_wrong_one(tmp_path: Path) -> None:
    config = config_io.from_dict({"data": {"fit": "pad", "spacing": 0.3}}, "test")
    opened = open_dataset(DataConfig(root=str(dataset(tmp_path)), threads=1))
    stated = weights_options(config, opened, 1)
    assert (stated["fit"], stated["spacing"]) == ("pad", 0.3)
    for wrong in ({"fit": "crop"}, {"fit": "pad", "spacing": -1}, {"spacing": "x"}):
        path = save_model(brightness_model(), tmp_path / "w.safetensors", size=[32], **wrong)
        with pytest.raises(DataError, match="contradicts itself"):
            load_model(path)
    assert load_model(save_model(brightness_model(), tmp_path / "w.safetensors", size=[32])).fit == "stretch"


def test_a_mask_of_a_padded_image_is_written_at_its_own_size(tmp_path: Path) -> None:
    weights = save_model(brightness_model(), tmp_path / "w.safetensors", size=[96], fit="pad", class_names=["bone"])
    save_image(tmp_path / "leg.png", pixels(1, 96, 12))
    predict([str(tmp_path / "leg.png"), "--weights", str(weights), "--output", str(tmp_path / "out")])
    np.testing.assert_array_equal(Image.open(tmp_path / "out/leg_mask.png"), pixels(1, 96, 12) > 128)
