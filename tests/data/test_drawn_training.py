"""Training images drawn anew from surfaces: image k depends on the seed and k alone, and held-out bodies stay out."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pdrunet_jax.config import Config, DataConfig, check
from pdrunet_jax.data.dataset import Dataset
from pdrunet_jax.data.masks import PADDING
from pdrunet_jax.data.phantoms.surfaces.files import DRAWN
from pdrunet_jax.data.pipeline import Batch, TrainBatches, open_training_data, train_batches
from pdrunet_jax.runtime.errors import UserError
from tests.support.stick_man import write_bodies


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    root = tmp_path_factory.mktemp("drawn")
    surfaces = str(write_bodies(root / "bodies", 4))
    return DataConfig(str(root / "data"), (40,), fit="pad", phantoms=8, surfaces=surfaces, threads=2)


@pytest.fixture(scope="module")
def dataset(config: DataConfig) -> Dataset:
    return open_training_data(config)


def batches_of(dataset: Dataset, config: DataConfig, size: int = 4, shard: tuple[int, int] = (0, 1)) -> TrainBatches:
    return train_batches(dataset, config, batch_size=size, channels=1, seed=7, process_shard=shard)


def taken(batches: TrainBatches, count: int) -> list[Batch]:
    found = [next(batches) for _ in range(count)]
    batches.close()
    return found


def test_an_image_depends_on_seed_and_number_alone(dataset: Dataset, config: DataConfig) -> None:
    whole = taken(batches_of(dataset, config), 3)
    images = np.concatenate([batch["image"] for batch in whole])
    assert len({image.tobytes() for image in images}) == 12  # none twice
    assert [batch["index"].tolist() for batch in whole] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert set(np.unique([batch["mask"] for batch in whole])) == {0, 1, PADDING}
    # Other batches, threads and processes, and a position that is restored.
    other = taken(batches_of(dataset, replace(config, threads=1), size=2, shard=(1, 2)), 4)
    assert np.array_equal(np.concatenate([batch["image"] for batch in other]), images[1:8:2])
    batches = batches_of(dataset, config)
    next(batches)
    state = batches.get_state()
    batches.close()
    later = batches_of(dataset, config)
    later.set_state(state)
    assert all(
        np.array_equal(first[key], then[key])
        for first, then in zip(whole[1:], taken(later, 2), strict=True)
        for key in first
    )
    # None of them is among the images to validate and test on, or in a run with another seed.
    seen = taken(train_batches(dataset, config, batch_size=4, channels=1, seed=8), 1)
    assert not np.array_equal(seen[0]["image"], whole[0]["image"])


def test_bodies_to_validate_and_test_on_are_not_trained_on(dataset: Dataset, config: DataConfig) -> None:
    assert dataset.drawn is not None
    assert {sample.split for sample in dataset.samples} == {"val", "test"}
    with (Path(config.root) / DRAWN).open() as file:
        body = {row["image"]: row["body"] for row in csv.DictReader(file)}
    held = {body[sample.id] for sample in dataset.samples}
    assert {each.name for each in dataset.drawn.bodies} == {f"body_{number}" for number in range(4)} - held
    assert f"{len(held)} bodies are held out" in "\n".join(dataset.notes)
    # Other surfaces are other data, wherever they lie.
    assert dataset.fingerprint() != replace(dataset, drawn=None).fingerprint()
    other = replace(dataset.drawn, digest="other")
    assert dataset.fingerprint() != replace(dataset, drawn=other).fingerprint()


def test_masks_are_of_the_classes_of_the_dataset(dataset: Dataset) -> None:
    assert dataset.drawn is not None
    bone = dataset.drawn.image(0, 7, 1)[1]
    names = ("tibia", "femur", "patella", "fibula", "pelvis")
    label = replace(dataset.drawn, names=names).image(0, 7, 1)[1]
    layers = replace(dataset.drawn, names=names, overlap=True).image(0, 7, 3)
    assert layers[0].shape == (40, 40, 3)
    assert layers[1].shape == (40, 40, 5)
    field = bone != PADDING
    assert np.array_equal(bone > 0, label > 0)
    assert np.array_equal((layers[1] == 1).any(axis=-1), (bone == 1) & field)
    for place in range(5):  # the pixels that a bone owns are part of its silhouette
        assert (layers[1][..., place] == 1)[label == place + 1].all()


def test_what_cannot_be_trained_on_is_refused(dataset: Dataset, config: DataConfig, tmp_path: Path) -> None:
    from pdrunet_jax.data.phantoms.surfaces.training import draws_anew

    with pytest.raises(UserError, match=r"has the classes femur, humerus, and what is drawn from data\.surfaces"):
        draws_anew(replace(dataset, class_names=("femur", "humerus")), config)
    with pytest.raises(UserError, match=f"--data.surfaces {tmp_path}: no surfaces there"):
        draws_anew(dataset, replace(config, surfaces=str(tmp_path)))
    for setting in ({"soft_masks": True, "fit": "stretch"}, {"spacing": 0.5}, {"fold": "1/2"}):
        with pytest.raises(UserError, match=r"is not for training images that are drawn from data\.surfaces"):
            check(Config(data=replace(config, **setting)), "here")
    # Without a table of bodies, as in a folder of real X-rays, all of them are trained on.
    real = draws_anew(replace(dataset, root=tmp_path), config)
    assert real.drawn is not None
    assert len(real.drawn.bodies) == 4
