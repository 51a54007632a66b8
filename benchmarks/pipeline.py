"""python -m benchmarks.pipeline: images per second of the input pipeline, beside the same work in PyTorch.

Both sides read the same PNG files (grey images, two-valued masks), resize them (bilinear; nearest), and hand out
shuffled batches of uint8. Each variant runs in a process of its own, all of them in turn, several rounds; medians are
reported. PyTorch has no torchvision here: its transforms are Pillow's calls, as torchvision's own are. It gets its
best: 0 or 2 persistent workers, and a variant that keeps decoded tensors in memory and fetches a batch by one index.
The first epoch holds everything from the closed files to the last batch: for us the check of the whole dataset (two
digests of each file, its patients, its mask values), in which the cache is filled; for PyTorch the start of workers,
and the decoding for what is kept in memory, by threads. Imports and compilation are left out on both sides.

With augmentation, the work is flip, rotation, scale, shift and gamma: ours on whole batches in compiled code (as in
training), PyTorch's per image by Pillow in the workers.
"""

import datetime
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks import machine

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = (
    "ours",
    "torch_0_workers",
    "torch_2_workers",
    "torch_in_memory",
    "ours_augmented",
    "torch_2_workers_augmented",
    "torch_in_memory_augmented",
)
DEGREES, ZOOM, SHIFT, GAMMA = 10.0, 0.1, 0.05, 0.3


@dataclass(frozen=True)
class Options:
    """Images per second of the input pipeline, beside the same work in a PyTorch DataLoader."""

    images: int = 96
    """Images in the dataset, all for training."""
    source: int = 512
    """Side of the PNG files in pixels."""
    size: int = 256
    """Side that they are resized to."""
    batch_size: int = 8
    """Images in each batch."""
    epochs: int = 6
    """Epochs, of which the first is reported by itself."""
    rounds: int = 5
    """Processes of each variant."""
    train_steps: int = 0
    """Also train so long with the phantom configuration, and report the wait for data."""
    output: Path | None = None
    """Folder for the result as JSON."""


@dataclass(frozen=True)
class Work:
    """What one process does."""

    variant: str
    data: str
    images: int
    size: int
    batch_size: int
    epochs: int


def main() -> None:
    options = tyro.cli(Options)
    with tempfile.TemporaryDirectory() as name:
        result = compare(options, Path(name))
    print(table(result))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        path = options.output / f"pipeline_{datetime.datetime.now(datetime.UTC):%Y%m%d_%H%M%S}.json"
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(path)


def compare(options: Options, folder: Path) -> dict[str, Any]:
    """Every variant in turn, `options.rounds` times."""
    data = folder / "data"
    draw(data, options.images, options.source)
    rounds: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    shared = (options.images, options.size, options.batch_size, options.epochs)
    for number in range(options.rounds):
        for variant in VARIANTS if number % 2 == 0 else VARIANTS[::-1]:
            work = json.dumps(asdict(Work(variant, str(data), *shared)))
            command = [sys.executable, "-c", "from benchmarks import pipeline; pipeline.measure()", work]
            rounds[variant].append(json.loads(run(command).splitlines()[-1]))
            print(f"round {number + 1} of {options.rounds}: {variant} {rounds[variant][-1]}", flush=True)
    medians = {
        variant: {key: statistics.median(one[key] for one in measured) for key in measured[0]}
        for variant, measured in rounds.items()
    }
    result = {
        "benchmark": "pipeline",
        "settings": {name: value for name, value in vars(options).items() if isinstance(value, int)},
        "machine": {**machine.facts(), **{name: importlib.metadata.version(name) for name in ("grain", "pillow")}},
        "images_per_second": medians,
        "rounds": rounds,
    }
    if options.train_steps:
        result["training"] = train(folder, options.train_steps)
    return result


def draw(root: Path, count: int, side: int) -> None:
    """Phantoms, all of them for training."""
    from pdrunet_jax.data.phantom_files import Drawing, write_phantoms

    write_phantoms(root, Drawing(count, size=side))
    rows = (root / "manifest.csv").read_text(encoding="utf-8").splitlines()
    kept = [rows[0], *(row.rsplit(",", 1)[0] + ",train" for row in rows[1:])]
    (root / "manifest.csv").write_text("\n".join(kept) + "\n", encoding="utf-8")


def measure() -> None:
    """Print images per second of the first and of the later epochs of one variant, as JSON."""
    work = Work(**json.loads(sys.argv[1]))
    side = ours if work.variant.startswith("ours") else theirs
    epoch, finish = side(work)
    times = []
    for _ in range(work.epochs):
        start = time.perf_counter()
        count = epoch()
        times.append((time.perf_counter() - start) / count)
    finish()
    whole = len(times) / sum(times)
    later = 1 / statistics.median(times[1:])
    print(json.dumps({"first_epoch": 1 / times[0], "later_epochs": later, "all_epochs": whole}))


def ours(work: Work) -> tuple[Callable[[], int], Callable[[], None]]:
    """An epoch of our pipeline; the first one opens and checks the dataset."""
    from pdrunet_jax.config import DataConfig
    from pdrunet_jax.data.dataset import open_dataset
    from pdrunet_jax.data.pipeline import TrainBatches, train_batches

    config = DataConfig(root=str(work.data), size=(work.size,), val_fraction=0.0)
    opened: list[TrainBatches] = []
    change = augmentation(work) if work.variant.endswith("augmented") else None

    def epoch() -> int:
        if not opened:
            dataset = open_dataset(config)
            opened.append(train_batches(dataset, config, batch_size=work.batch_size, channels=1, seed=0))
        steps = work.images // work.batch_size
        for _ in range(steps):
            batch = next(opened[0])
            if change:
                change(batch)
        return steps * work.batch_size

    return epoch, lambda: opened[0].close()


def augmentation(work: Work) -> Callable[[dict[str, Any]], None]:
    """Our augmentation, compiled beforehand as the training step is."""
    import jax
    import numpy as np

    from pdrunet_jax.config import AugmentConfig
    from pdrunet_jax.data.augment import augment, sample_keys
    from pdrunet_jax.scaling import unit_range

    settings = AugmentConfig(
        flip_horizontal=0.5, flip_vertical=0.5, rotate=DEGREES, scale=ZOOM, translate=SHIFT, gamma=GAMMA
    )

    @jax.jit
    def change(image: Any, mask: Any, epoch: Any, index: Any) -> Any:
        return augment(unit_range(image), mask, sample_keys(jax.random.key(0), epoch, index), settings)

    shape = (work.batch_size, work.size, work.size)
    numbers = np.zeros(work.batch_size, np.int32)
    jax.block_until_ready(change(np.zeros((*shape, 1), np.uint8), np.zeros(shape, np.uint8), numbers, numbers))
    return lambda batch: jax.block_until_ready(change(*(batch[key] for key in ("image", "mask", "epoch", "index"))))


def theirs(work: Work) -> tuple[Callable[[], int], Callable[[], None]]:
    """An epoch of a PyTorch DataLoader."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset

    torch.set_num_threads(1)  # batches are copied faster so, and its workers do the same
    names = sorted(path.name for path in (Path(work.data) / "images").iterdir())
    size = (work.size, work.size)
    augmented = work.variant.endswith("augmented")
    in_memory = "in_memory" in work.variant

    def decode(name: str) -> tuple[Image.Image, Image.Image]:
        with (
            Image.open(Path(work.data) / "images" / name) as image,
            Image.open(Path(work.data) / "masks" / name) as mask,
        ):
            image, mask = image.convert("L"), mask.convert("L")
        return image.resize(size, Image.Resampling.BILINEAR), mask.resize(size, Image.Resampling.NEAREST)

    def tensors(image: Image.Image, mask: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = torch.from_numpy(np.array(image)).unsqueeze(0)
        classes = torch.from_numpy(np.array(mask) // np.uint8(255))
        return (pixels.float() / 255, classes) if augmented else (pixels, classes)

    def changed(image: Image.Image, mask: Image.Image) -> tuple[Image.Image, Image.Image]:
        draw = torch.rand(6).tolist()
        for place, way in enumerate((Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM)):
            if draw[place] < 0.5:
                image, mask = image.transpose(way), mask.transpose(way)
        angle, zoom = np.radians(DEGREES) * (2 * draw[2] - 1), (1 + ZOOM) ** (2 * draw[3] - 1)
        half, shift = work.size / 2, SHIFT * work.size * (2 * draw[4] - 1)
        cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
        across, down = half - cos * half + sin * half + shift, half - sin * half - cos * half + shift
        matrix = (cos, -sin, across, sin, cos, down)
        image = image.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
        mask = mask.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)
        exponent = 2 ** (GAMMA * (2 * draw[5] - 1))
        return image.point([round(255 * (grey / 255) ** exponent) for grey in range(256)]), mask

    class Files(Dataset):
        kept: Any = None

        def __len__(self) -> int:
            return len(names)

        def fill(self) -> None:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                pairs = list(pool.map(decode, names))
            self.kept = (
                pairs if augmented else [torch.stack(part) for part in zip(*(tensors(*p) for p in pairs), strict=True)]
            )

        def __getitem__(self, index: int) -> Any:
            pair = self.kept[index] if in_memory else decode(names[index])
            return tensors(*(changed(*pair) if augmented else pair))

    class InMemory(Files):
        def __getitems__(self, indices: list[int]) -> Any:
            """A whole batch by one index into each tensor: nothing is faster here."""
            rows = torch.tensor(indices)
            return [part.index_select(0, rows) for part in self.kept]

    dataset = InMemory() if in_memory and not augmented else Files()
    workers = 2 if "2_workers" in work.variant or (in_memory and augmented) else 0
    loader = DataLoader(
        dataset,
        batch_size=work.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=(lambda batch: batch) if isinstance(dataset, InMemory) else None,
    )

    def epoch() -> int:
        if in_memory and dataset.kept is None:
            dataset.fill()  # before the workers are forked, so that they share it
        return sum(len(images) for images, _ in loader)

    return epoch, lambda: None


def train(folder: Path, steps: int) -> dict[str, float]:
    """The wait for data in a real run of the shipped phantom configuration."""
    run_folder = folder / "run"
    command = [sys.executable, "-m", "pdrunet_jax.train", "--config", str(ROOT / "configs" / "phantom.toml")]
    command += ["--workdir", str(run_folder), "--data.root", str(folder / "phantoms"), "--train.steps", str(steps)]
    run(command)
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    later = [line for line in lines if "time/data_wait" in line][1:]  # the first waits for the compiler and the cache
    return {
        "steps": steps,
        "data_wait": statistics.median(line["time/data_wait"] for line in later),
        "largest_data_wait": max(line["time/data_wait"] for line in later),
        "images_per_second": statistics.median(line["time/images_per_second"] for line in later),
    }


def run(command: list[str]) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


def table(result: dict[str, Any]) -> str:
    """Images per second and ratios to the fastest PyTorch variant of the same kind."""
    measured = result["images_per_second"]
    lines = [f"{'images/s':28}{'first epoch':>14}{'later epochs':>14}{'all epochs':>14}"]
    keys = ("first_epoch", "later_epochs", "all_epochs")
    for variant in VARIANTS:
        lines.append(f"{variant:28}" + "".join(f"{measured[variant][key]:14.0f}" for key in keys))
    for ending in ("", "_augmented"):
        for memory in (False, True):
            others = [
                name
                for name in VARIANTS
                if name.startswith("torch")
                and name.endswith("augmented") == bool(ending)
                and ("memory" in name) == memory
            ]
            ratios = (measured[f"ours{ending}"][key] / max(measured[name][key] for name in others) for key in keys)
            label = f"ratio to {'in memory' if memory else 'DataLoader'}{ending.replace('_', ', ')}"
            lines.append(f"{label:28}" + "".join(f"{ratio:14.2f}" for ratio in ratios))
    if training := result.get("training"):
        lines.append(f"training: waits for data {training['data_wait']:.2%} of the time")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
