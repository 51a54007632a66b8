"""Options of the command `train`: a configuration by name, and each of its settings as an option."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from pdrunet_jax.config import FOLD, Config, check, load
from pdrunet_jax.runtime import cli
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.processes import DetectCluster, Distributed


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """Train PDR-UNet. Started again on the same run folder, training resumes exactly where it stopped.

    A resumed run may have other --train.steps, more to prolong it or fewer to end it sooner, another --train.patience,
    other --optim.restarts, and other --tracking, --train.log-every, --train.save-every, --train.keep-latest,
    --train.keep-best, --train.samples and --train.eval-batch-size. All other settings have to stay.

    Exit codes: 0 done, 2 bad input, 1 failure, 75 stopped by a signal (or a closed pipe) with everything saved.
    """

    config: str = "mura"
    """Name of a configuration (mura, mura_small, phantom, lower_limb_own and others in configs/) or a TOML file."""
    workdir: Path | None = None
    """Run folder; by default runs/ and the configuration's name."""
    folds: int | None = None
    """Cross-validation: train N runs, fold_1 to fold_N in the run folder, each of which tests on another part of the
    patients; then score every image. Started again, the command goes on, and finished folds are not repeated."""
    fold: str | None = None
    """K/N: train only the K-th of N folds, as in 2/5: one on each of several machines."""
    verify: Path | None = None
    """Check the digests, weights, metrics and configuration of this run folder, and change nothing."""
    finish: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """End a stopped run at its newest checkpoint, with test scores and report. The command without --finish goes on."""
    detect: DetectCluster = False
    """Train in several processes, started by SLURM, Kubernetes or Cloud TPU."""
    distributed: Distributed = dataclasses.field(default_factory=Distributed)
    settings: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)

    @property
    def run_folder(self) -> Path:
        """The run folder, given or derived."""
        return self.workdir or Path("runs") / Path(self.config).stem

    @property
    def fold_numbers(self) -> tuple[tuple[int, ...], int]:
        """The folds to train, and how many there are; none and 0 for a run without folds. Raises `UserError`."""
        if self.folds is None and self.fold is None:
            return (), 0
        if self.finish or (self.folds and self.fold):
            raise UserError(
                "--folds, --fold and --finish exclude one another; to end all folds sooner, lower --train.steps"
            )
        text = self.fold or f"1/{self.folds}"
        found = re.fullmatch(FOLD, text)
        number, count = map(int, text.split("/")) if found else (0, 0)
        if not 1 <= number <= count >= 2:
            given = f"--fold {self.fold}: give K/N, as in 2/5" if self.fold else f"--folds {self.folds}: give 2 or more"
            raise UserError(f"{given}; N from 2 to 9999 and K from 1 to N")
        return (number,) if self.fold else tuple(range(1, count + 1)), count


def parse(arguments: Sequence[str]) -> TrainOptions:
    """Parse `arguments`. They override the configuration that they name, which overrides the defaults.

    Raises:
        UserError: no `--config`, an unusable one, or a setting out of bounds.
        SystemExit: `--help` (0), or an option that does not exist or cannot be parsed (2, after a message).
    """
    given = {argument.split("=")[0] for argument in arguments}
    name, settings = named_settings(arguments, optional=bool({"-h", "--help", "--verify"} & given))
    default = TrainOptions(config=name or "mura", settings=settings)
    prog = cli.program("train")
    options = tyro.cli(TrainOptions, prog=prog, args=list(arguments), default=default, use_underscores=False)
    options = dataclasses.replace(options, settings=check(options.settings, "the command line"))
    _ = options.fold_numbers  # checked before anything is loaded
    return options


def named_settings(arguments: Sequence[str], *, optional: bool) -> tuple[str | None, Config]:
    """The name after `--config` in `arguments`, and its settings as defaults of the others.

    Raises `UserError` if it is unusable, or missing unless `optional`: then the settings are the defaults.
    """
    name = cli.first_value(arguments, "--config")
    if name is None and not optional:
        raise UserError("--config is missing: give the name of a configuration or a TOML file, as in --config phantom")
    settings = load(name) if name is not None else Config()
    return name, dataclasses.replace(settings, data=settings.data.under(arguments))
