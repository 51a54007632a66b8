"""What a run makes of its settings and its data before it trains."""

from pathlib import Path

from pdrunet_jax.config import AugmentConfig, Config, settings_digest
from pdrunet_jax.data.dataset import Dataset
from pdrunet_jax.data.masks import MaskCoding
from pdrunet_jax.model.sides import Pairs
from pdrunet_jax.train.final import weights_options
from pdrunet_jax.train.run import settle_flips


def dataset(names: tuple[str, ...], pairs: Pairs | None) -> Dataset:
    return Dataset(Path("data"), "data", names, MaskCoding(), (), (), swap_on_flip=pairs)


def test_mirroring_is_settled_before_the_run_records_its_settings() -> None:
    flips = Config(augment=AugmentConfig(flip_horizontal=0.5, rotate=5))
    pairs = (("left", "right"),)
    plain = dataset(("femur", "tibia"), ())
    assert settle_flips(flips, plain) == flips
    assert settle_flips(Config(), dataset(("left", "right"), pairs)) == Config()
    swapping = settle_flips(flips, dataset(("left", "right"), pairs))
    assert swapping.data.swap_on_flip == pairs
    assert settings_digest(swapping) != settings_digest(flips)
    without = settle_flips(flips, dataset(("left",), None))
    assert without.augment == AugmentConfig(rotate=5)


def test_weights_keep_the_classes_that_change_places() -> None:
    pairs = (("left", "right"),)
    options = weights_options(Config(), dataset(("left", "right"), pairs), 3)
    assert (options["swap_on_flip"], options["vertical_flips"]) == ([["left", "right"]], False)
    flips = Config(augment=AugmentConfig(flip_vertical=0.5))
    assert weights_options(flips, dataset(("left", "right"), pairs), 3)["vertical_flips"]
    assert weights_options(Config(), dataset(("left", "right"), ()), 3)["swap_on_flip"] == []
    for names, unknown in ((("femur", "tibia"), ()), (("left",), None)):
        assert "swap_on_flip" not in weights_options(Config(), dataset(names, unknown), 3)
