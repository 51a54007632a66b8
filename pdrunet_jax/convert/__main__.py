"""Command `convert`: weights, or a whole training run, from one format to another."""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import tyro

from pdrunet_jax.config import Config, DataConfig, ModelConfig, to_toml
from pdrunet_jax.convert.training import is_training_state, run_to_torch, torch_to_run
from pdrunet_jax.model.build import TITLES
from pdrunet_jax.model.files import TORCH_SUFFIXES, read_weights, write_pth, write_safetensors
from pdrunet_jax.model.load import MODEL_OPTIONS, Loaded, load_weights
from pdrunet_jax.model.weights import DEAD_BLOCK, dead_entries, to_public
from pdrunet_jax.runtime import cli
from pdrunet_jax.runtime.checkpoint import Checkpoints
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.files import atomic_write, replace_folder, require_replaceable, writing

CONVERTED = {"config.toml", "best.safetensors", "checkpoints"}
"""Contents of a converted run folder; a folder with anything else in it is never replaced."""


@dataclass(frozen=True)
class ConvertOptions:
    """Convert weights between PyTorch files, .safetensors and run folders, or convert a whole training run.

    A source is read by its content: any file of PyTorch (.pth, .pt, .ckpt, .bin, ...), .safetensors, or a run folder.
    The name of the destination decides its format: .pth and .pt are PyTorch state dicts, .safetensors opens in both
    frameworks, and a name without suffix is a run folder.
    """

    src: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Source: a PyTorch checkpoint, .safetensors, a run folder, or one of its checkpoints."""
    dst: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """Destination: .pth, .pt, .safetensors, or a new run folder (a name without suffix)."""
    shortcut: Literal["input", "conv1"] | None = None
    """Shortcut of a .pth, which does not state it: input as in the public code (assumed), conv1 as in the paper."""
    up: Literal["bilinear", "bilinear_corners"] | None = None
    """Bilinear resizing of a .pth of unet or fusionnet, which does not state it: bilinear_corners if it aligns the
    corners, bilinear if not (assumed)."""
    which: Literal["best", "latest"] = "best"
    """Weights to take from a run folder."""
    to_torch_training_state: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write the latest training state of run folder SRC, with optimizer and step, to a .pth for resuming in PyTorch.
    Converted back, it becomes a run folder that training resumes."""
    config: str | None = None
    """Configuration to resume training with, for a .pth that contains an optimizer but no configuration."""
    force: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Replace DST if it exists."""


def convert(options: ConvertOptions) -> list[str]:
    """Convert weights or a whole training run, completely or not at all; returns lines to print.

    A training run is converted with `to_torch_training_state`, or from a `.pth` that contains an optimizer and has a
    configuration, its own or the given one.

    Raises:
        UserError: The source is invalid, the destination has an unknown suffix or exists, or the source contains no
            training run where one is needed.
        RunError: The destination cannot be written.
    """
    src, dst = options.src, options.dst
    _check_target(src, dst, options.force)

    # A whole training run.
    if options.to_torch_training_state:
        if dst.suffix.lower() not in TORCH_SUFFIXES or src.is_file():
            raise UserError("--to-torch-training-state reads a run folder or one of its checkpoints and writes a .pth")
        return run_to_torch(src, dst)
    if options.config is not None and (dst.suffix or not src.is_file()):
        raise UserError("--config is for a .pth that becomes a run folder")
    if not dst.suffix and src.is_file():
        content = read_weights(src).arrays
        if options.config is not None or is_training_state(content):
            if dst.exists() and any(dst.iterdir()):
                raise UserError(f"{dst} already contains a run; convert a training run to a new folder")
            return torch_to_run(content, src, dst, options.config)

    # Weights alone.
    loaded = load_weights(src, shortcut=options.shortcut, up=options.up, which=options.which)
    arrays = to_public(loaded.params, loaded.stats)
    if dst.suffix.lower() in TORCH_SUFFIXES:
        write_pth(dst, arrays)
    elif dst.suffix:
        write_safetensors(dst, arrays, loaded.options)
    else:
        _write_run_folder(dst, arrays, loaded)
    return _summary(src, dst, loaded)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; `arguments` default to those of the process."""
    print("\n".join(convert(tyro.cli(ConvertOptions, args=arguments, prog=cli.program("convert")))))


def _check_target(src: Path, dst: Path, force: bool) -> None:
    if dst.suffix.lower() not in ("", ".safetensors", *TORCH_SUFFIXES):
        raise UserError(f"{dst}: DST must be a .pth, .pt or .safetensors file, or a run folder (a name without suffix)")
    if not dst.exists():
        return
    if dst.is_dir() and dst.suffix:
        raise UserError(f"{dst} is a folder; give the name of a file")
    if not dst.is_dir() and not dst.suffix:
        raise UserError(f"{dst} is a file; give the name of a new run folder")
    if dst.is_dir() and (others := sorted({path.name for path in dst.iterdir()} - CONVERTED)):
        raise UserError(f"{dst} contains more than weights ({', '.join(others[:5])}); give the name of a new folder")
    if dst.is_file() or any(dst.iterdir()):
        require_replaceable(dst, src, force)


def _write_run_folder(dst: Path, arrays: dict[str, np.ndarray], loaded: Loaded) -> None:
    """Write a minimal run folder under a temporary name, then rename it."""
    config = Config(
        model=ModelConfig(**{name: loaded.options[name] for name in MODEL_OPTIONS if name in loaded.options}),
        data=DataConfig(
            size=loaded.size or DataConfig.size,
            fit=loaded.fit,
            spacing=loaded.spacing,
            multilabel=loaded.multilabel,
        ),
    )
    header = "Converted weights, not trained here: only [model], data.size, fit, spacing and multilabel apply."
    with writing(dst):
        dst.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=dst.parent, prefix=f".{dst.name}.") as scratch:
            folder = Path(scratch) / "new"
            folder.mkdir()
            atomic_write(folder / "config.toml", to_toml(config, header))
            write_safetensors(folder / "best.safetensors", arrays, loaded.options)
            weights = {"params": loaded.params, "stats": loaded.stats}
            checkpoints = Checkpoints(folder / "checkpoints", keep_latest=1, keep_best=1)
            checkpoints.save(0, weights, position={}, extra={"options": loaded.options})
            replace_folder(folder, dst)


def _summary(src: Path, dst: Path, loaded: Loaded) -> list[str]:
    leaves = jax.tree.leaves(loaded.params)
    used = sum(array.size for array in leaves)
    lines = [f"{src}: {used:,} used parameters, {leaves[0].dtype}", *(f"  {note}" for note in loaded.notes)]
    if loaded.options["name"] == "pdrunet":
        rows = dead_entries(loaded.options["filters"], loaded.options["norm"])
        dead = sum(math.prod(row.shape) for row in rows if row.parameter)
        lines += [
            f"{dst}: {used + dead:,} parameters, {used:,} of them used",
            f"  filled {DEAD_BLOCK}.* with zeros: {dead:,} unused parameters that the public code's loader requires",
        ]
    else:
        lines.append(f"{dst}: {TITLES[loaded.options['name']]}, {used:,} parameters")
    unstated = {"fit": loaded.fit != "stretch", "spacing": loaded.spacing, "multilabel": loaded.multilabel}
    if dst.suffix.lower() in TORCH_SUFFIXES and (lost := [name for name, differs in unstated.items() if differs]):
        lines.append(
            f"  a {dst.suffix} does not state data.{', data.'.join(lost)}: read here, it is used without; keep "
            "best.safetensors for prediction"
        )
    for option, value in (("shortcut", "conv1"), ("up", "bilinear_corners")):
        if dst.suffix.lower() in TORCH_SUFFIXES and loaded.options.get(option) == value:
            lines.append(f"  a {dst.suffix} does not state {option}: read it with --{option} {value}")
    return lines


if __name__ == "__main__":
    cli.run(main)
