"""A whole comparison of two small networks with two seeds: its files, how it goes on, and what is refused."""

import csv
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdrunet_jax.compare import speed
from pdrunet_jax.compare.options import CompareOptions, parse
from pdrunet_jax.compare.run import prepare, run
from pdrunet_jax.config import AugmentConfig, read
from pdrunet_jax.data.dataset import open_dataset
from pdrunet_jax.data.pipeline import train_batches
from pdrunet_jax.model.build import with_network
from pdrunet_jax.runtime.errors import DataError, UserError
from pdrunet_jax.runtime.run_folder import read_entries
from pdrunet_jax.runtime.stop import StopFlag
from pdrunet_jax.train import step
from tests.support.tiny import save_dataset

NETWORKS = ("unet depth=1", "fusionnet depth=1")
"""Quick to compile."""
FOLDERS = ("unet_depth-1", "fusionnet_depth-1")


def options(root: Path, *more: str) -> CompareOptions:
    small = (
        "--config phantom --data.phantoms 0 --data.size 16 --data.threads 1 --model.filters 2 --train.steps 4 "
        "--train.batch-size 2 --train.eval-every 4 --train.save-every 4 --train.log-every 1 --train.samples 0 --seeds 2"
    )
    return parse(
        [*small.split(), "--data.root", str(root / "data"), "--output", str(root / "out"), "--models", *NETWORKS, *more]
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the dataset data/ and its finished comparison out/."""
    root = tmp_path_factory.mktemp("compare")
    save_dataset(root / "data", count=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "ROUNDS", 1)
        patch.setattr(speed, "TURN", 0.0)
        patch.setenv("WANDB_MODE", "disabled")
        assert run(options(root), StopFlag()) == 0
        yield root


def test_trainings_differ_in_the_network_alone_and_saw_the_same_images(finished: Path) -> None:
    out = finished / "out"
    runs = {(name, seed): out / name / f"seed_{seed}" for name in FOLDERS for seed in (0, 1)}
    settings = {key: read(path / "config.toml") for key, path in runs.items()}
    assert [(config.model.name, config.seed) for config in settings.values()] == [
        ("unet", 0),
        ("unet", 1),
        ("fusionnet", 0),
        ("fusionnet", 1),
    ]
    planned = json.loads((out / "compare.json").read_text())["models"]
    for (name, _), config in settings.items():
        steps = {model["folder"]: model["steps"] for model in planned}[name]
        assert config.train.steps == steps
        assert (config.data, config.augment) == (settings[FOLDERS[0], 0].data, settings[FOLDERS[0], 0].augment)
    # Digests of all samples so far, in order, where both networks logged a step.
    for seed in (0, 1):
        logs = [read_entries(runs[name, seed] / "metrics.jsonl") for name in FOLDERS]
        first, second = ({e["step"]: e["data/sequence"] for e in log if e and "data/sequence" in e} for log in logs)
        assert first.keys() & second.keys()
        assert all(first[number] == second[number] for number in first.keys() & second.keys())
    assert len({(path / "training_images.txt").read_text() for path in runs.values()}) == 1


def test_augmented_images_depend_on_the_seed_but_not_on_the_network(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Seen(Exception):  # noqa: N818
        """Carries what a network would see."""

    def stop(_graph: Any, _execution: Any, _loss: Any, _weights: Any, data: Any, *_: Any, **__: Any) -> None:
        raise Seen(data)

    monkeypatch.setattr(step, "accumulate", stop)
    given = options(finished)
    augment = AugmentConfig(flip_horizontal=0.5, rotate=10.0, scale=0.1, gamma=0.4, noise=0.05, elastic=1.0)
    dataset = open_dataset(given.settings.data)
    seen = {}
    for network in NETWORKS:
        for seed in (0, 1):
            config = replace(with_network(given.settings, network), seed=seed, augment=augment)
            batches = train_batches(dataset, config.data, batch_size=4, channels=1, seed=seed)
            state: Any = SimpleNamespace(params={}, stats=None, step=0)  # comes into play only after the images
            with pytest.raises(Seen) as caught:
                step.train_step(config, None, 1, state, jax.tree.map(jnp.asarray, next(batches)))
            batches.close()
            seen[network, seed] = [np.asarray(array) for array in jax.tree.leaves(caught.value.args[0])]
    for seed in (0, 1):
        for here, there in zip(seen[NETWORKS[0], seed], seen[NETWORKS[1], seed], strict=True):
            np.testing.assert_array_equal(here, there)
    assert np.abs(seen[NETWORKS[0], 0][0] - seen[NETWORKS[0], 1][0]).max() > 0.1


def test_results_agree_with_the_scores_of_the_runs(finished: Path) -> None:
    out = finished / "out"
    values = json.loads((out / "compare.json").read_text())
    assert [model["network"] for model in values["models"]] == list(NETWORKS)
    for model in values["models"]:
        summaries = [
            json.loads((out / model["folder"] / f"seed_{seed}" / "evaluation" / "test" / "summary.json").read_text())
            for seed in (0, 1)
        ]
        for metric in ("dice", "nsd"):
            means = [summary["macro"][metric]["mean"] for summary in summaries]
            found = model["scores"]["square"][metric]
            assert found["by_seed"] == pytest.approx(means, abs=1e-6)
            assert found["mean"] == pytest.approx(np.mean(means), abs=1e-6)
    with (out / "compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 4
    assert {row["image"] for row in rows} == {f"images/{number}.png" for number in (4, 5, 6, 7)}
    page = (out / "compare.html").read_text()
    assert page.count("<figure>") == 4 * len(values["cases"]) > 0
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert all((out / name).is_file() for case in values["cases"] for name in case["panels"])


def test_equal_time_is_measured_once_and_kept(finished: Path) -> None:
    given = options(finished, "--budget", "time", "--output", str(finished / "timed"))
    dataset = open_dataset(given.settings.data)
    given.folder.mkdir()
    prepared = prepare(given, dataset, "cpu", StopFlag())
    assert prepared is not None
    plan, speeds = prepared
    first, other = (speeds[network].step_seconds for network in NETWORKS)
    assert [each.steps for each in plan.models] == [4, max(1, round(4 * first / other))]
    path = given.folder / "speed.json"
    slower = json.loads(path.read_text())
    slower["networks"][NETWORKS[1]]["step_seconds"] *= 100
    path.write_text(json.dumps(slower))
    again = prepare(given, dataset, "cpu", StopFlag())
    assert again is not None
    assert again[0] == plan


def test_a_finished_comparison_trains_nothing_again(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = finished / "out"
    files = [*out.glob("*/seed_*/best.safetensors"), out / "plan.toml", out / "speed.json"]
    before = {path: path.stat().st_mtime_ns for path in files}
    assert len(before) == 6
    table = (out / "compare.csv").read_bytes()
    # A training that was scored by other rules since is scored again.
    summary = out / FOLDERS[0] / "seed_1" / "evaluation" / "test" / "summary.json"
    summary.write_text(summary.read_text().replace('"tolerance": 2.0', '"tolerance": 5.0'))
    summary.with_name("per_image.csv").unlink()
    assert run(options(finished), StopFlag()) == 0
    printed = capsys.readouterr().out
    assert printed.count(": finished, ") == 3
    assert "step 1/" not in printed
    assert {path: path.stat().st_mtime_ns for path in files} == before
    assert (out / "compare.csv").read_bytes() == table
    assert re.search(r"^unet depth=1: dice \d\.\d{3} \(95% .*\), sd over seeds \d\.\d{3}$", printed, re.MULTILINE)
    assert "fusionnet depth=1: dice " in printed.splitlines()[-1]


def test_another_order_of_networks_or_fewer_are_compared_without_training(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turned = replace(options(finished), models=NETWORKS[::-1], seeds=1)
    shutil.copytree(finished / "out", finished / "turned")
    assert run(replace(turned, output=finished / "turned"), StopFlag()) == 0
    assert capsys.readouterr().out.count(": finished, ") == 2
    values = json.loads((finished / "turned" / "compare.json").read_text())
    assert (values["seeds"], values["differences"][0]["against"]) == ([0], NETWORKS[1])


def test_what_does_not_belong_to_the_comparison_is_refused(finished: Path) -> None:
    out = finished / "out"
    with pytest.raises(DataError) as refused:
        run(options(finished, "--budget", "time", "--train.steps", "6", "--data.size", "24"), StopFlag())
    assert refused.value.problems == ("--budget: steps -> time", "data.size: [16] -> [24]", "train.steps: 4 -> 6")
    with pytest.raises(UserError, match="holds a training; choose another --output"):
        run(options(finished, "--output", str(out / FOLDERS[0] / "seed_0")), StopFlag())
    manifest = finished / "data" / "manifest.csv"
    text = manifest.read_text()
    manifest.write_text(text.replace(",test", ",train"))
    with pytest.raises(UserError, match="no test images to compare networks on"):
        run(options(finished), StopFlag())
    manifest.write_text(text.replace("p9,val", "p9,train").replace("p10,train", "p10,val"))
    with pytest.raises(UserError, match="have changed since the comparison"):
        run(options(finished), StopFlag())
    manifest.write_text(text)
    config = out / FOLDERS[0] / "seed_0" / "config.toml"
    text = config.read_text()
    config.write_text(text.replace("learning_rate = 0.005", "learning_rate = 0.006"))
    with pytest.raises(DataError, match=r"move them away(?s:.*)seed_0: optim\.learning_rate: 0\.006 -> 0\.005"):
        run(options(finished), StopFlag())
    config.write_text(text)
