"""The part of the data that each process reads, and what several processes evaluate and predict together."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pdrunet_jax.config import DataConfig
from pdrunet_jax.data.dataset import open_dataset
from pdrunet_jax.data.pipeline import eval_batches, train_batches
from tests.support import ROOT
from tests.support.tiny import brightness_model, save_model
from tests.support.together import Site, ends, free_port, save_squares


def test_the_shares_of_a_batch_are_the_batch_whatever_their_number(tmp_path: Path) -> None:
    config = DataConfig(root=str(save_squares(tmp_path, 22, "train")), size=(8,), threads=1)
    dataset = open_dataset(config)

    def first_batches(shares: int, count: int = 5) -> list[dict[str, np.ndarray]]:
        parts = [
            train_batches(dataset, config, batch_size=4, channels=1, seed=1, process_shard=(number, shares))
            for number in range(shares)
        ]
        found = []
        for _ in range(count):
            rows = [next(part) for part in parts]
            found.append({name: np.concatenate([row[name] for row in rows]) for name in rows[0]})
            assert all(np.array_equal(part.index, found[-1]["index"]) for part in parts)
        assert all(part.get_state() == parts[0].get_state() for part in parts)
        return found

    alone = first_batches(1)
    for shares in (2, 4):
        for batch, expected in zip(first_batches(shares), alone, strict=True):
            assert all(np.array_equal(batch[name], expected[name]) for name in expected)


@pytest.mark.parametrize("shares", [1, 2, 8])
def test_each_of_101_images_is_validated_once(tmp_path: Path, shares: int) -> None:
    config = DataConfig(root=str(save_squares(tmp_path, 101, "val")), size=(8,), threads=1)
    dataset = open_dataset(config)
    seen: list[int] = []
    batches = set()
    for number in range(shares):
        mine = list(eval_batches(dataset, "val", config, batch_size=16, channels=1, process_shard=(number, shares)))
        batches.add(len(mine))
        for batch in mine:
            assert len(batch["image"]) == 16 // shares
            seen += batch["index"][batch["valid"]].tolist()
    assert sorted(seen) == list(range(101))
    assert batches == {7}  # equal in every process, or one would wait for another


def test_several_processes_of_several_devices_evaluate_every_image_once_as_one_does(tmp_path: Path, site: Site) -> None:
    data = save_squares(tmp_path / "data", 101, "test")
    weights = save_model(brightness_model(), tmp_path / "w.safetensors", size=[32, 32])
    command = ["--weights", weights, "--data.root", data, "--batch-size", 16, "--output"]
    [(code, _, err)] = ends([site.command("evaluate", *command, tmp_path / "alone")])
    assert (code, err) == (0, "")
    with site.together(2, "evaluate", *command, tmp_path / "both", devices=4) as processes:
        (code, out, err), (other_code, other_out, other_err) = ends(processes)
    assert (code, err, other_code, other_err) == (0, "", 0, "")
    assert out.splitlines()[-1].startswith("test dice ")
    assert "dice" not in other_out
    rows = (tmp_path / "both" / "per_image.csv").read_text()
    assert len(rows.splitlines()) == 1 + 101
    assert rows == (tmp_path / "alone" / "per_image.csv").read_text()


def test_shards_on_several_devices_segment_every_image_once_as_one_process_does(tmp_path: Path, site: Site) -> None:
    images = save_squares(tmp_path / "data", 11, "test") / "images"
    weights = save_model(brightness_model(), tmp_path / "w.safetensors", size=[32, 32])
    command = [images, "--weights", weights, "--output"]
    [(code, _, err)] = ends([site.command("predict", *command, tmp_path / "alone")])
    assert (code, err) == (0, "")
    shards = [site.command("predict", *command, tmp_path / "both", "--shard", f"{k}/2", devices=2) for k in (1, 2)]
    found = ends(shards)
    assert [(code, err) for code, _, err in found] == [(0, "")] * 2
    assert [out.splitlines()[-1].split()[0] for _, out, _ in found] == ["6", "5"]
    expected = sorted((tmp_path / "alone").glob("*.png"))
    assert len(expected) == 22
    for path in expected:
        assert np.array_equal(np.asarray(Image.open(tmp_path / "both" / path.name)), np.asarray(Image.open(path)))


def test_evaluate_finds_the_other_processes_of_a_cluster(tmp_path: Path, site: Site) -> None:
    data = save_squares(tmp_path / "data", 3, "test")
    weights = save_model(brightness_model(), tmp_path / "w.safetensors", size=[32, 32])
    slurm = {"SLURM_JOB_ID": str(free_port()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    command = ["evaluate", "--weights", weights, "--data.root", data, "--output", tmp_path / "out", "--distributed"]
    processes = []
    for index in range(2):
        task = {**slurm, "SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)}
        processes.append(Site(site.path, {**site.environment, **task}).command(*command))
    found = ends(processes)
    assert [(code, err) for code, _, err in found] == [(0, "")] * 2
    assert [out.count("test dice") for _, out, _ in found] == [1, 0]
    assert len((tmp_path / "out" / "per_image.csv").read_text().splitlines()) == 1 + 3


def test_a_state_saved_on_4_devices_comes_back_bit_for_bit_on_1_2_and_8(tmp_path: Path) -> None:
    code = """
import sys, jax, numpy as np
from pathlib import Path
from pdrunet_jax.runtime.checkpoint import Checkpoints
from pdrunet_jax.runtime.devices import Placement, make_mesh
values = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
values[0, :3] = -0.0, np.nan, np.float32(1e-42)
state = {"w": values, "step": np.int32(7)}
on = lambda count: Placement(make_mesh(jax.devices()[:count]))
Checkpoints(Path(sys.argv[1]), 1, 1).save(7, on(4).replicate(state), position={})
for count in (1, 2, 8):
    restored = Checkpoints(Path(sys.argv[1]), 1, 1).restore(state).state
    placed = on(count).replicate(restored)
    assert len(placed["w"].sharding.device_set) == count
    assert np.asarray(placed["w"]).tobytes() == values.tobytes() and int(placed["step"]) == 7
"""
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "c")], check=True, env=environment)
