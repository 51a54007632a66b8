"""The command line of `train`: a configuration by name, and every setting of it as an option."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from pdrunet_jax import config as config_io
from pdrunet_jax.config import Config
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.processes import DetectCluster, Distributed


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """Train PDR-UNet; started again on the same run folder, resume exactly where it stopped.

    Exit code 0: done; 2: bad input; 1: failure; 75: asked to stop (SIGTERM, SIGINT), and saved.
    """

    config: str = "mura"
    """Name of a configuration (mura, mura_baseline, paper, phantom) or a TOML file."""
    workdir: Path | None = None
    """Run folder; runs/NAME after the configuration's name when left out."""
    verify: Path | None = None
    """Check this run folder and end: digests, weights, metrics and configuration; nothing is trained or changed."""
    detect: DetectCluster = False
    """Train in several processes, as SLURM, Kubernetes or Cloud TPU have started them."""
    distributed: Distributed = dataclasses.field(default_factory=Distributed)
    rows: Annotated[int, tyro.conf.arg(name="distributed.rows")] = 1
    """Devices that share each image, a part of its rows each; for images too large for one device."""
    settings: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)

    @property
    def run_folder(self) -> Path:
        """Where the run is kept."""
        return self.workdir or Path("runs") / Path(self.config).stem


def parse(arguments: Sequence[str]) -> TrainOptions:
    """Options from `arguments`, over the configuration they name, over the defaults.

    Raises:
        UserError: no `--config`, one that cannot be used, or a setting out of its bounds.
        SystemExit: `--help` (0), or an option that does not exist or does not parse (2, after a message).
    """
    name = _config_name(arguments)
    if name is None and not {"-h", "--help", "--verify"} & {argument.split("=")[0] for argument in arguments}:
        raise UserError("--config is missing: give the name of a configuration or a TOML file, as in --config phantom")
    settings = config_io.load(name) if name is not None else Config()
    default = TrainOptions(config=name or "mura", settings=settings)
    options = tyro.cli(
        TrainOptions, prog="python -m pdrunet_jax.train", args=list(arguments), default=default, use_underscores=False
    )
    return dataclasses.replace(options, settings=config_io.check(options.settings, "the command line"))


def _config_name(arguments: Sequence[str]) -> str | None:
    """The last value of --config, which has to be known before the other options have their defaults."""
    name = None
    for position, argument in enumerate(arguments):
        if argument == "--config" and position + 1 < len(arguments):
            name = arguments[position + 1]
        elif argument.startswith("--config="):
            name = argument.removeprefix("--config=")
    return name
