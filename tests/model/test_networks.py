"""U-Net and FusionNet: options, files that say which network they hold, and what is refused."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdrunet_jax.config import ModelConfig, from_dict
from pdrunet_jax.model.execution import Execution
from pdrunet_jax.model.files import read_weights, write_safetensors
from pdrunet_jax.model.load import load_model, load_weights
from pdrunet_jax.model.start import load_same
from pdrunet_jax.runtime.errors import DataError, UserError
from tests.support.tiny import network, save_model

OTHERS = ("unet", "fusionnet")


def saved(path: Path, **options: Any) -> Path:
    """Weights of a small network, with the options that training would state."""
    options = {"filters": 2, "depth": 1, "dropout": 0.0} | options
    return save_model(network(**options), path, **ModelConfig(**options).wiring())


def parameters(**options: Any) -> int:
    state = jax.eval_shape(lambda: network(**options))
    return sum(leaf.size for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating))


def test_the_sizes_of_the_papers() -> None:
    """U-Net has 31.0 million parameters at 64 filters; each normalisation adds four numbers a channel."""
    normalised = 2 * 2 * (64 + 128 + 256 + 512) + 2 * 1024
    assert parameters(name="unet", filters=64) == 31_030_593 + 4 * normalised


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("up", ["transposed", "bilinear_corners"])
def test_a_file_says_which_network_it_holds(name: str, up: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "w.safetensors", name=name, up=up, down="stride", outputs=2, in_channels=3)
    model = load_model(path, conv="plain")
    config = model.config
    assert (config.name, config.depth, config.down, config.up) == (name, 1, "stride", up)
    with pytest.raises(DataError, match=f"--model.name is pdrunet, there it is {name}"):
        load_same(path, vars(ModelConfig()))
    with pytest.raises(DataError, match=r"--model\.filters is 3, there it is 2"):
        load_same(path, {**vars(config), "filters": 3})

    images = np.random.default_rng(0).random((1, 9, 7, 3), np.float32)
    fused = load_model(path)(images, execution=Execution.of("auto"))
    np.testing.assert_allclose(model(images), fused, atol=1e-5)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"name": "fusionnet"}, "name is stated as 'fusionnet', but the arrays show 'unet'"),
        ({"name": "pdrunet"}, "name is stated as 'pdrunet', but the arrays show 'unet'"),
        ({"depth": 2}, "depth is stated as 2, but the arrays show 1"),
        ({"up": "bilinear"}, "up is stated as 'bilinear', but the arrays show 'transposed'"),
        ({"up": "transposed_corners"}, "up is 'transposed_corners'"),
    ],
)
def test_options_that_contradict_the_arrays_are_refused(stated: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = read_weights(saved(tmp_path / "w.safetensors", name="unet"))
    write_safetensors(tmp_path / "x.safetensors", file.arrays, {**file.options, **stated})
    with pytest.raises(DataError, match=message):
        load_weights(tmp_path / "x.safetensors")


def test_missing_arrays_of_a_network_are_named(tmp_path: Path) -> None:
    file = read_weights(saved(tmp_path / "w.safetensors", name="fusionnet"))
    arrays = {key: array for key, array in file.arrays.items() if not key.startswith("up_0.conv")}
    write_safetensors(tmp_path / "x.safetensors", arrays, file.options)
    with pytest.raises(DataError, match=r"weights of a FusionNet(.|\n)*up_0.conv.weight is missing"):
        load_weights(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"depth": 3}, "model.depth is no option of pdrunet"),
        ({"up": "bilinear", "down": "stride"}, "model.down is no option of pdrunet"),
        ({"name": "unet", "shortcut": "conv1"}, "model.shortcut is no option of unet"),
        ({"name": "unet", "conv": "pallas"}, "model.conv = pallas is for pdrunet"),
        ({"name": "unet", "depth": 8}, "data.size must be at least 512"),
        ({"name": "vnet"}, "model.name"),
    ],
)
def test_options_that_a_network_does_not_have_are_refused(model: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_dict({"model": model}, "test")


def test_networks_are_refused_where_they_are_built_and_images_where_they_are_too_small() -> None:
    with pytest.raises(UserError, match="pallas is for pdrunet"):
        network(name="fusionnet", conv="pallas")
    with pytest.raises(UserError, match=r"3 x 9 pixels are too small for model\.depth = 2: at least 4 a side"):
        network(name="unet", filters=1, depth=2)(jnp.zeros((1, 3, 9, 1)))
