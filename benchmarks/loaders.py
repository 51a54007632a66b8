"""Input pipelines compared by `benchmarks.pipeline`: ours, and equivalent PyTorch DataLoaders.

The PyTorch side calls Pillow directly for its transforms, as torchvision does. Augmentation is flip, rotation, scale,
shift and gamma: ours on whole batches in compiled code (as in training), PyTorch's per image by Pillow in the workers.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEGREES, ZOOM, SHIFT, GAMMA = 10.0, 0.1, 0.05, 0.3


@dataclass(frozen=True)
class Work:
    """The measurement of one process."""

    variant: str
    data: str
    images: int
    size: int
    batch_size: int
    epochs: int


def measure() -> None:
    """Print the images per second of one variant as JSON: first epoch, later epochs, all epochs."""
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
    """One epoch of our pipeline, and its clean-up; the first epoch opens and checks the dataset."""
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
    """Our augmentation, compiled in advance like the training step."""
    import jax
    import numpy as np

    from pdrunet_jax.config import AugmentConfig
    from pdrunet_jax.data.augment import augment, sample_keys
    from pdrunet_jax.model.pixels import unit_range

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
    """One epoch of a PyTorch DataLoader, and its clean-up."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset

    torch.set_num_threads(1)  # copies batches faster; the workers use one thread as well
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
            """Fetch a batch with one indexing operation per tensor: the fastest way here."""
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
            dataset.fill()  # before forking the workers, so that they share it
        return sum(len(images) for images, _ in loader)

    return epoch, lambda: None
