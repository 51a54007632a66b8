"""Small models and datasets with known results."""

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image
from scipy import ndimage

from pdrunet_jax.config import ModelConfig
from pdrunet_jax.model.build import build
from pdrunet_jax.model.files import write_safetensors
from pdrunet_jax.model.network import PDRUNet
from pdrunet_jax.model.weights import to_public
from tests.support import ROOT


def network(seed: int = 0, *, param_dtype: str = "float32", **options: Any) -> Any:
    """A network with these options of `ModelConfig`; a PDR-UNet unless they name another."""
    return build(ModelConfig(**options), param_dtype=param_dtype, rngs=nnx.Rngs(seed))


def brightness_model(outputs: int = 1, in_channels: int = 1) -> PDRUNet:
    """Build a PDR-UNet that classifies by brightness alone: above 0.5 is class 1.

    With 3 outputs, above 0.25 is class 1 and above 0.75 class 2. With 2, for overlapping classes, above 0.25 is class 1
    and above 0.5 class 2, too. Every block is the identity, and the long skips add up
    to 32 times the image.
    """
    model = network(in_channels=in_channels, outputs=outputs, filters=1, norm="none", dropout=0.0, conv="plain")
    for name, block in vars(model).items():
        if not hasattr(block, "second"):
            continue
        for conv in (block.first, block.second):
            conv.kernel.set_value(jnp.zeros_like(conv.kernel[...]))
            conv.bias.set_value(jnp.zeros_like(conv.bias[...]))
        if name == "std_block":
            block.first.kernel.set_value(block.first.kernel[...].at[1, 1, 0, 0].set(1.0))
            block.second.kernel.set_value(block.second.kernel[...].at[1, 1, 0, 0].set(1.0))
    slope = {1: [1.0], 2: [1.0, 1.0], 3: [0.0, 1.0, 2.0]}[outputs]
    shift = {1: [-16.0], 2: [-8.0, -16.0], 3: [0.0, -8.0, -32.0]}[outputs]
    model.final_conv.kernel.set_value(jnp.array(slope).reshape(1, 1, 1, outputs))
    model.final_conv.bias.set_value(jnp.array(shift))
    return model


def overflowing_model() -> PDRUNet:
    """Build a model of finite weights whose logits are NaN or infinite."""
    model = brightness_model()
    for conv in (model.std_block.first, model.std_block.second):
        conv.kernel.set_value(conv.kernel[...] * 3e38)
    return model


def save_model(model: PDRUNet, path: Path, **options: object) -> Path:
    _, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    stated = {"shortcut": "input", "dropout": 0.0, **options}
    write_safetensors(path, to_public(params, stats, dead_block=False), stated)
    return path


def save_image(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def run_command(name: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `python -m pdrunet_jax.NAME` in the folder `cwd`; the package need not be installed."""
    command = [sys.executable, "-m", f"pdrunet_jax.{name}", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment)


def bright_square(height: int, width: int, top: int, left: int, side: int, value: int = 200) -> np.ndarray:
    pixels = np.full((height, width), 20, np.uint8)
    pixels[top : top + side, left : left + side] = value
    return pixels


def blobs(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Return a random mask of smooth shapes that covers 2 to 80 % of the pixels."""
    noise = ndimage.gaussian_filter(rng.standard_normal(shape), rng.uniform(0.5, 4))
    return noise > np.quantile(noise, rng.uniform(0.2, 0.98))


def save_dataset(root: Path, *, errors: dict[int, int] | None = None, count: int = 6, ignore: bool = False) -> Path:
    """Write images of bright squares with masks: two images a patient, the second half in the test split.

    `errors[number]` adds columns to the mask that are not bright; with `ignore` they have the ignored value instead.
    """
    rows = []
    for number in range(count):
        image = bright_square(24, 32, 4, 6 + number, 12)
        image[0, number] = 90 + number  # no two images with the same pixels in two splits
        truth = np.where(image > 128, 255, 0)
        extra = (errors or {}).get(number, 0)
        if extra:
            truth[4:16, 18 + number : 18 + number + extra] = 127 if ignore else 255
        save_image(root / f"images/{number}.png", image)
        save_image(root / f"masks/{number}.png", truth)
        split = "test" if number >= count // 2 else ("val" if number == 0 else "train")
        rows.append(
            [f"images/{number}.png", f"masks/{number}.png", f"p{number // 2 if split == 'test' else number + 9}"]
        )
        rows[-1].append(split)
    with (root / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "mask", "patient", "split"], *rows])
    (root / "dataset.toml").write_text('name = "squares"\nignore = 127\n[classes]\nsquare = 255\n')
    return root
