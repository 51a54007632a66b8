import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdrunet_jax.model.load import load_model
from pdrunet_jax.predict.__main__ import main
from pdrunet_jax.predict.inference import forward, resize_to_image, segment
from pdrunet_jax.predict.postprocess import Cleaning
from pdrunet_jax.predict.threshold import apply_threshold
from pdrunet_jax.runtime.errors import RunError, UserError
from tests.support.tiny import bright_square, brightness_model, overflowing_model, save_image, save_model


def test_a_bright_square_is_segmented_exactly_at_its_own_resolution():
    pixels = bright_square(40, 56, 10, 20, 16)
    result = segment(brightness_model(), pixels)
    assert result.mask.dtype == np.uint8
    np.testing.assert_array_equal(result.mask, pixels > 128)
    assert result.probability.shape == (40, 56)
    assert result.probability.dtype == np.float32
    assert result.spacing is None


def test_a_mask_has_the_inputs_resolution_whatever_size_the_network_works_at(tmp_path):
    path = save_image(tmp_path / "x.png", bright_square(90, 60, 20, 10, 40))
    result = segment(brightness_model(), path, size=(32, 32))
    assert result.mask.shape == result.probability.shape == (90, 60)
    disagree = result.mask != (bright_square(90, 60, 20, 10, 40) > 128)
    assert 0 < disagree.mean() < 0.05  # only the square's outline


def test_the_trained_size_is_used(tmp_path):
    model = brightness_model()
    model.size = (16, 16)
    pixels = bright_square(64, 64, 20, 20, 3)  # too small to survive shrinking to a quarter
    assert segment(model, pixels).mask.sum() < 9
    assert segment(model, pixels, size=(64, 64)).mask.sum() == 9


def test_several_classes_give_probabilities_that_sum_to_one():
    pixels = np.full((32, 48), 20, np.uint8)
    pixels[:, 16:32], pixels[:, 32:] = 120, 230
    result = segment(brightness_model(3), pixels)
    assert result.probability.shape == (32, 48, 3)
    np.testing.assert_allclose(result.probability.sum(axis=-1), 1, atol=1e-5)
    np.testing.assert_array_equal(result.mask, np.repeat([[0, 1, 2]], 32, axis=0).repeat(16, axis=1))


def test_floats_and_bytes_give_the_same_mask():
    pixels = bright_square(32, 32, 4, 4, 9)
    first = segment(brightness_model(), pixels).mask
    np.testing.assert_array_equal(segment(brightness_model(), pixels[..., None] / 255).mask, first)


def test_a_lower_threshold_takes_in_more():
    pixels = np.full((32, 32), 126, np.uint8)
    assert segment(brightness_model(), pixels).mask.max() == 0
    assert segment(brightness_model(), pixels, threshold=0.4).mask.min() == 1


def test_mirrored_images_are_averaged_after_they_are_turned_back():
    model = brightness_model()
    model.std_block.first.kernel.set_value(jnp.roll(model.std_block.first.kernel[...], (1, 1), (0, 1)))  # looks aside
    pixels = bright_square(24, 32, 5, 8, 9)

    def shown(image: np.ndarray) -> np.ndarray:
        return segment(model, image).probability

    once = shown(pixels), np.fliplr(shown(np.fliplr(pixels)))
    assert not np.array_equal(*once)
    np.testing.assert_allclose(segment(model, pixels, augmentation="flip").probability, sum(once) / 2, atol=1e-6)
    both = np.flipud(shown(np.flipud(pixels))), np.rot90(shown(np.rot90(pixels, 2)), 2)
    every = sum((*once, *both)) / 4
    np.testing.assert_allclose(segment(model, pixels, augmentation="flips").probability, every, atol=1e-6)


def test_classes_of_either_side_change_places_in_mirrored_images(tmp_path):
    names = ["femur_left", "femur_right"]
    path = save_model(brightness_model(outputs=3), tmp_path / "w.safetensors", class_names=names)
    pixels = bright_square(24, 32, 5, 8, 9, value=255)
    model = load_model(path)
    once = segment(model, pixels).probability
    np.testing.assert_allclose(
        segment(model, pixels, augmentation="flip").probability, (once + once[..., [0, 2, 1]]) / 2, atol=1e-6
    )
    with pytest.raises(UserError, match=r"augmentation flips: .* top-bottom mirror images; use flip"):
        segment(model, pixels, augmentation="flips")
    declared = save_model(brightness_model(outputs=3), path, class_names=names, swap_on_flip=[])
    np.testing.assert_allclose(segment(load_model(declared), pixels, augmentation="flips").probability, once, atol=1e-6)
    alone = save_model(brightness_model(), path, class_names=["left femur"])
    with pytest.raises(UserError, match="no class is the other side of left femur"):
        segment(load_model(alone), pixels, augmentation="flip")


def test_an_image_is_segmented_in_tiles_at_its_own_size():
    model = brightness_model()
    model.size = (16, 16)
    pixels = bright_square(64, 96, 20, 40, 3)
    result = segment(model, pixels, size="own", tile=16, halo=8, augmentation="flip")
    np.testing.assert_array_equal(result.mask, pixels > 128)


def test_a_mask_is_cleaned():
    pixels = bright_square(32, 32, 4, 4, 9)
    pixels[30, 30] = 200
    result = segment(brightness_model(), pixels, cleaning=Cleaning(largest=1))
    np.testing.assert_array_equal(result.mask, bright_square(32, 32, 4, 4, 9) > 128)
    assert result.probability[30, 30] > 0.5


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((4, 4, 3), np.uint8), r"\(4, 4, 3\).*\(H, W, 1\)"),
        (np.zeros((4, 4), np.int32), "int32"),
        (np.full((4, 4), 2.0), "float64"),
        (np.full((4, 4), np.nan), "float64"),
    ],
)
def test_pixels_of_another_form_are_refused(pixels, message):
    with pytest.raises(UserError, match=message):
        segment(brightness_model(), pixels)


def test_logits_that_are_not_finite_are_an_error_not_an_empty_mask(tmp_path):
    path = save_image(tmp_path / "in/x.png", bright_square(24, 32, 4, 4, 9))
    weights = save_model(overflowing_model(), tmp_path / "w.safetensors")
    with pytest.raises(RunError, match="the image: the network computes NaN"):
        segment(overflowing_model(), np.asarray(bright_square(24, 32, 4, 4, 9)))
    with pytest.raises(RunError, match=r"x\.png: the network computes NaN"):
        main([str(path), "--weights", str(weights), "--output", str(tmp_path / "out")])
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["areas.csv"]


def test_a_threshold_makes_no_sense_for_competing_classes():
    with pytest.raises(UserError, match="3 outputs"):
        segment(brightness_model(3), np.zeros((8, 8), np.uint8), threshold=0.3)


def test_a_second_model_of_the_same_kind_compiles_nothing(caplog: pytest.LogCaptureFixture):
    images = np.zeros((2, 16, 24, 1), np.uint8)
    first, second = brightness_model(), brightness_model()
    second.final_conv.bias.set_value(second.final_conv.bias[...] + 100)
    low = np.asarray(forward(first, images))
    with jax.log_compiles():
        high = np.asarray(forward(second, images))
    assert not [message for message in caplog.messages if "Compiling" in message]
    np.testing.assert_array_equal(high, low + 100)


def test_probabilities_are_interpolated_before_they_are_decided():
    """Between two pixels at 0.9 and 0.1 the edge falls half-way, not at a copied pixel's border."""
    wide = resize_to_image(np.array([[[0.9], [0.1]]]), (1, 8))
    assert wide.shape == (1, 8)
    assert (np.diff(wide[0]) <= 0).all()
    np.testing.assert_array_equal(apply_threshold(wide), [[1, 1, 1, 1, 0, 0, 0, 0]])


def test_dicom_spacing_is_kept(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    dataset.SOPInstanceUID = "1.2.3.4"
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = 20, 24, 1
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.PixelSpacing = [0.2, 0.25]
    dataset.PixelData = (bright_square(20, 24, 5, 5, 8).astype(np.uint16) * 16).tobytes()
    dataset.save_as(tmp_path / "x.dcm", enforce_file_format=True)
    result = segment(brightness_model(), tmp_path / "x.dcm")
    assert result.spacing == (0.2, 0.25)
    np.testing.assert_array_equal(result.mask, bright_square(20, 24, 5, 5, 8) > 128)
