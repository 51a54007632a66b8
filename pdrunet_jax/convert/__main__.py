"""python -m pdrunet_jax.convert: weights, or a whole training, from one format to another, in every direction."""

import dataclasses
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro

from pdrunet_jax import config as config_io
from pdrunet_jax.config import Config, DataConfig, ModelConfig
from pdrunet_jax.convert import training as convert_training
from pdrunet_jax.model.files import TORCH_SUFFIXES, read_weights, write_pth, write_safetensors
from pdrunet_jax.model.load import MODEL_OPTIONS, Loaded, load_weights
from pdrunet_jax.model.weights import DEAD_BLOCK, dead_entries, to_public
from pdrunet_jax.runtime import cli
from pdrunet_jax.runtime.errors import RunError, UserError

OURS = {"config.toml", "best.safetensors", "checkpoints"}
"""What `convert` puts into a run folder; a folder with anything else in it is not replaced."""


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
    """Convert weights between the public PyTorch code's files, .safetensors and run folders; or a whole training.

    The format follows from the name: .pth and .pt are PyTorch state dicts, .safetensors opens in both frameworks, and
    a name without suffix is a run folder.
    """

    src: Annotated[Path, tyro.conf.Positional]
    """What to read: .pth, .pt, .safetensors, a run folder, or a checkpoint in one."""
    dst: Annotated[Path, tyro.conf.Positional]
    """What to write: .pth, .pt, .safetensors, or a new run folder (a name without suffix)."""
    shortcut: Literal["input", "conv1"] | None = None
    """Wiring of a .pth, which cannot state it: input is the public code's, and assumed; conv1 the paper's."""
    which: Literal["best", "latest"] = "best"
    """Which weights of a run folder."""
    to_torch_training_state: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write the newest state of the run folder SRC with optimizer and step, not weights alone, to a .pth, from which
    PyTorch goes on. Converted back, it becomes a run folder that training resumes."""
    config: str | None = None
    """Configuration of a run folder DST that is to be trained on, for a .pth SRC with an optimizer that does not say
    its own."""
    force: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Replace DST if it exists."""


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    shortcut: Literal["input", "conv1"] | None = None,
    which: Literal["best", "latest"] = "best",
    to_torch_training_state: bool = False,
    config: str | None = None,
    force: bool = False,
) -> list[str]:
    """Write what is in `src` to `dst`, whole or not at all; returns what a user should know, a line each.

    That is its weights; or, with `to_torch_training_state`, or for a `.pth` with an optimizer and a `config` of its own
    or given, the whole training (`pdrunet_jax.convert_training`).

    Raises:
        UserError: `src` cannot be used, `dst` has an unknown suffix, or exists and `force` is not given; a whole
            training is wanted where there is none.
        RunError: `dst` cannot be written.
    """
    src, dst = Path(src), Path(dst)
    if dst.suffix not in ("", ".safetensors", *TORCH_SUFFIXES):
        raise UserError(f"{dst}: DST is a .pth, .pt or .safetensors file, or a run folder, whose name has no suffix")
    if dst.exists() and src.resolve() == dst.resolve():
        raise UserError(f"{dst} is SRC itself; give another DST")
    _check_target(dst, force)
    if to_torch_training_state:
        if dst.suffix not in TORCH_SUFFIXES or src.is_file():
            raise UserError("--to-torch-training-state reads a run folder, or a checkpoint in one, and writes a .pth")
        return convert_training.run_to_torch(src, dst)
    if config is not None and (dst.suffix or src.suffix not in TORCH_SUFFIXES):
        raise UserError("--config is for a .pth that becomes a run folder")
    whole = src.suffix in TORCH_SUFFIXES and not dst.suffix and src.is_file()
    if whole and (config is not None or convert_training.is_training_state(read_weights(src).arrays)):
        return _new_run(src, dst, config)

    loaded = load_weights(src, shortcut=shortcut, which=which)
    used = sum(array.size for array in jax.tree.leaves(loaded.params))
    dtype = jax.tree.leaves(loaded.params)[0].dtype
    lines = [f"{src}: {used:,} used parameters, {dtype}", *(f"  {note}" for note in loaded.notes)]

    arrays = to_public(loaded.params, loaded.stats)
    if dst.suffix in TORCH_SUFFIXES:
        write_pth(dst, arrays)
    elif dst.suffix:
        write_safetensors(dst, arrays, loaded.options)
    else:
        _write_run_folder(dst, arrays, loaded)
    dead_rows = dead_entries(loaded.options["filters"], loaded.options["norm"])
    dead = sum(math.prod(row.shape) for row in dead_rows if row.parameter)
    lines.append(f"{dst}: {used + dead:,} parameters, {used:,} of them used")
    lines.append(f"  filled {DEAD_BLOCK}.* with zeros: {dead:,} parameters that only the public code's loader asks for")
    if dst.suffix in TORCH_SUFFIXES and loaded.options["shortcut"] != "input":
        lines.append(f"  a {dst.suffix} cannot state the wiring: read it with --shortcut {loaded.options['shortcut']}")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; `arguments` default to the process's own."""
    options = tyro.cli(ConvertOptions, args=arguments, prog="python -m pdrunet_jax.convert")
    lines = convert(
        options.src,
        options.dst,
        shortcut=options.shortcut,
        which=options.which,
        to_torch_training_state=options.to_torch_training_state,
        config=options.config,
        force=options.force,
    )
    print("\n".join(lines))


def _check_target(dst: Path, force: bool) -> None:
    if not dst.exists():
        return
    if dst.is_dir() and dst.suffix:
        raise UserError(f"{dst} is a folder; give the name of a file")
    if not dst.is_dir() and not dst.suffix:
        raise UserError(f"{dst} is a file; a run folder cannot be written there")
    if dst.is_dir() and (others := sorted({path.name for path in dst.iterdir()} - OURS)):
        raise UserError(f"{dst} holds more than weights ({', '.join(others[:5])}); give the name of a new folder")
    if not force and (dst.is_file() or any(dst.iterdir())):
        raise UserError(f"{dst} exists; give --force to replace it")


def _new_run(src: Path, dst: Path, config: str | None) -> list[str]:
    """Make the run folder of a training that goes on."""
    if dst.exists() and any(dst.iterdir()):
        raise UserError(f"{dst} holds a run already; a training is converted to a new folder")
    return convert_training.torch_to_run(src, dst, config)


def _write_run_folder(dst: Path, arrays: dict[str, np.ndarray], loaded: Loaded) -> None:
    """A minimal run folder, built under a temporary name and renamed."""
    from pdrunet_jax.runtime.checkpoint import save_weights

    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=dst.parent, prefix=f".{dst.name}.") as scratch:
            folder = Path(scratch) / "new"
            folder.mkdir()
            header = "Weights that were converted, not trained here; only [model] and data.size say something of them."
            (folder / "config.toml").write_text(config_io.to_toml(_config(loaded.options), header), encoding="utf-8")
            write_safetensors(folder / "best.safetensors", arrays, loaded.options)
            save_weights(folder, loaded.params, loaded.stats, loaded.options)
            if dst.exists():
                dst.rename(Path(scratch) / "old")
            folder.rename(dst)
    except OSError as error:
        raise RunError(f"{dst} cannot be written ({error.strerror})") from None


def _config(options: dict[str, Any]) -> Config:
    size = options.get("size")
    return Config(
        model=ModelConfig(**{name: options[name] for name in MODEL_OPTIONS}),
        data=DataConfig(size=tuple(size)) if size else DataConfig(),
    )


if __name__ == "__main__":
    cli.run(main)
