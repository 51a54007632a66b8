"""Folds that are killed and resumed end as folds that were left alone."""

import dataclasses
import shutil
import time

import pytest

from pdrunet_jax.config import read
from pdrunet_jax.data.dataset import open_dataset
from pdrunet_jax.runtime.errors import DataError
from pdrunet_jax.train.folds import require_one_training
from tests.support.live import Place, assert_same_run, stream

OPTIONS = ("--folds", "2", "--train.steps", "6")
KILLS = 3


@pytest.mark.stress
def test_folds_killed_and_resumed_end_with_the_same_scores(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, killed = place.path / "folds_alone", place.path / "folds_killed"
    result = place.train(*OPTIONS, workdir=alone)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-1].startswith("out-of-fold dice ")
    # First in the middle of the second fold, then anywhere.
    draw = stream("folds")
    for number in range(KILLS):
        with place.start(*OPTIONS, workdir=killed) as process:
            assert process.stdout is not None
            if number:
                time.sleep(draw.uniform(2.0, 8.0))
            else:
                lines = iter(process.stdout)
                next(line for line in lines if line.startswith("fold 2 of 2: "))
                next(line for line in lines if line.startswith("step 4/"))  # after a checkpoint
            process.kill()
    result = place.train(*OPTIONS, workdir=killed)
    assert (result.returncode, result.stderr) == (0, "")
    assert f"fold 1 of 2 is finished: {killed / 'fold_1'}" in result.stdout
    for name in ("per_image.csv", "curves.json"):
        assert (killed / name).read_bytes() == (alone / name).read_bytes()
    for fold in ("fold_1", "fold_2"):
        assert_same_run(killed / fold, alone / fold, step=6)

    # Other data is refused by name, before a fold is trained on it.
    monkeypatch.chdir(place.path)
    config = read(alone / "fold_2" / "config.toml")
    require_one_training(alone, config, open_dataset(config.data))
    shutil.copytree(place.path / "data", place.path / "other")
    manifest = place.path / "other" / "manifest.csv"
    manifest.write_text(manifest.read_text().replace("masks/phantom_00001.png", "masks/phantom_00002.png"))

    with pytest.raises(DataError, match=r"folds_alone/fold_1 was trained on other data"):
        require_one_training(
            alone, config, open_dataset(dataclasses.replace(config.data, root=str(place.path / "other")))
        )
