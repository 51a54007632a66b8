"""Training images drawn anew from surfaces: image k depends on the seed and k alone, and held-out bodies stay out."""

import csv
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from pdrunet_jax.config import Config, DataConfig, check
from pdrunet_jax.data.dataset import Dataset
from pdrunet_jax.data.masks import PADDING
from pdrunet_jax.data.phantoms.surfaces.drawers import Drawers
from pdrunet_jax.data.phantoms.surfaces.files import DRAWN
from pdrunet_jax.data.phantoms.surfaces.training import draws_anew
from pdrunet_jax.data.pipeline import Batch, TrainBatches, open_training_data, train_batches
from pdrunet_jax.model.load import load_weights
from pdrunet_jax.runtime.errors import RunError, UserError
from tests.support import ROOT
from tests.support.stick_man import write_bodies
from tests.support.tiny import run_command


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


def test_bones_that_overlap_are_drawn_into_both_folders(config: DataConfig, tmp_path: Path) -> None:
    several = replace(config, root=str(tmp_path / "layers"), multilabel=True)
    dataset = open_training_data(several)
    assert set(dataset.class_names) == {"femur", "tibia", "fibula", "patella", "pelvis"}
    assert dataset.drawn is not None
    assert 0 < len(dataset.drawn.bodies) < 4
    (batch,) = taken(batches_of(dataset, several), 1)
    assert batch["mask"].shape == (4, 40, 40, 5)


def test_what_cannot_be_trained_on_is_refused(dataset: Dataset, config: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has the classes femur, humerus, and what is drawn from data\.surfaces"):
        draws_anew(replace(dataset, class_names=("femur", "humerus")), config)
    with pytest.raises(UserError, match=f"surfaces {tmp_path}: no file of surfaces there"):
        draws_anew(dataset, replace(config, surfaces=str(tmp_path)))
    for setting in ({"soft_masks": True, "fit": "stretch"}, {"spacing": 0.5}):
        with pytest.raises(UserError, match=r"is not for training images that are drawn from data\.surfaces"):
            check(Config(data=replace(config, **setting)), "here")
    with pytest.raises(UserError, match="have no folds"):
        draws_anew(dataset, replace(config, fold="1/2"))
    # Without a table of bodies, as in a folder of real X-rays, all of them are trained on.
    real = draws_anew(replace(dataset, root=tmp_path), config)
    assert real.drawn is not None
    assert len(real.drawn.bodies) == 4


def test_processes_that_draw_end_in_every_case(dataset: Dataset, config: DataConfig) -> None:
    assert dataset.drawn is not None
    drawers = Drawers(dataset.drawn.images, 1)
    process = drawers._idle.get()
    drawers._idle.put(process)
    assert np.array_equal(drawers([3], 7, 1)[0][0], dataset.drawn.image(3, 7, 1)[0])
    process.terminate()  # as batch systems do, to all processes: the training asks for its last batch yet
    assert drawers([4], 7, 1)
    process.kill()
    with pytest.raises(RunError, match=r"a process that draws X-rays has ended \(exit code -9\)"):
        drawers([5], 7, 1)
    drawers.close()
    drawers.close()
    # Whoever holds standard error open would be waited for.
    lines = (
        "import os, sys; from pdrunet_jax.config import DataConfig;"
        "from pdrunet_jax.data.pipeline import open_training_data, train_batches;"
        "config = DataConfig(sys.argv[1], (40,), fit='pad', surfaces=sys.argv[2], threads=2);"
        "next(train_batches(open_training_data(config), config, batch_size=2, channels=1, seed=7));"
        "os.kill(os.getpid(), 9)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", lines, config.root, str(config.surfaces)],
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    assert (ended.returncode, ended.stderr) == (-9, b"")


@pytest.mark.stress
def test_a_killed_run_goes_on_with_the_next_image_and_ends_bit_equal(config: DataConfig, tmp_path: Path) -> None:
    settings: list[object] = ["--config", "lower_limb", "--data.surfaces", config.surfaces, "--data.root", config.root]
    settings += ["--data.size", 40, "--data.phantoms", 8, "--model.filters", 4, "--train.batch-size", 2]
    settings += ["--train.steps", 12, "--train.eval-every", 6, "--train.save-every", 1, "--train.samples", 0]
    settings += ["--optim.warmup-steps", 0, "--tracking.wandb", "disabled", "--train.log-every", 1]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_command("train", *settings, "--workdir", whole, cwd=tmp_path).returncode == 0
    command = [sys.executable, "-m", "pdrunet_jax.train", *map(str, settings), "--workdir", str(killed)]
    process = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    while process.poll() is None and not (killed / "checkpoints" / "4").is_dir():
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert run_command("train", *settings, "--workdir", killed, "--data.threads", 1, cwd=tmp_path).returncode == 0
    ends = [load_weights(run, which="latest") for run in (whole, killed)]
    first, then = (jax.tree.leaves((end.params, end.stats)) for end in ends)
    assert all(np.array_equal(a, b) for a, b in zip(first, then, strict=True))
    last = [json.loads((run / "metrics.jsonl").read_text().splitlines()[-2]) for run in (whole, killed)]
    assert last[0].get("data/sequence") == last[1].get("data/sequence")
