"""The weights that are in the package: their cards, their size, and bones of a made-up body that they outline."""

import re

import numpy as np
import pytest

import pdrunet_jax
from pdrunet_jax.data.phantoms.surfaces.bodies import make_body
from pdrunet_jax.data.phantoms.surfaces.drawing import draw_xray
from pdrunet_jax.model.load import load_weights
from pdrunet_jax.model.shipped import FOLDER, SUFFIX
from tests.support.stick_man import stick_man

NAMES = sorted(path.stem for path in FOLDER.glob(f"*{SUFFIX}"))


def test_the_package_has_weights_of_four_megabytes_at_most() -> None:
    assert "lower-limb" in NAMES
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) <= 4 << 20


@pytest.mark.parametrize("name", NAMES)
def test_weights_have_a_card_with_data_licence_and_scores(name: str) -> None:
    card, weights = (FOLDER / f"{name}.md").read_text(), load_weights(name)
    for part in ("CC BY 4.0", "MPL-2.0", "## Scores", "## What it is not for", "under the licence of pdrunet-jax"):
        assert part in card
    assert not re.search(r"revision (unknown|.*-dirty)", card)
    for bone in weights.options["class_names"]:
        assert f"| {bone} | all views | 0." in card


@pytest.mark.parametrize("name", NAMES)
def test_bones_of_a_body_of_tubes_and_balls_are_outlined(name: str) -> None:
    model, body, scores = pdrunet_jax.load_model(name), make_body("tubes and balls", stick_man("left")), []
    for index in range(6):
        drawn = draw_xray([body], index, seed=3, size=256, difficulty="easy", views=("knee",), without=("exposure",))
        found = pdrunet_jax.segment(model, drawn.image).mask.reshape(*drawn.image.shape, -1).any(axis=-1)
        true = np.stack(list(drawn.masks.values())).any(axis=0)
        scores.append(2 * (found & true).sum() / (found.sum() + true.sum()))
    assert np.mean(scores) > 0.85
