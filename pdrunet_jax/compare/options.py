"""Options of the command `compare`: the networks, and every setting that they share."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from pdrunet_jax.compare.plan import Budget, full_name
from pdrunet_jax.config import Config, ModelConfig, check
from pdrunet_jax.model.build import with_network
from pdrunet_jax.runtime import cli
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.train.options import TrainOptions, named_settings

MOST_SEEDS = 1000


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """Compare networks: train each of them with several seeds on the same images, then score all and write a page.

    Splits, images, order, augmentation and every setting but the network are the same for all. Started again with the
    same options, the command goes on where it stopped; what is trained is not trained again. Networks and seeds may
    be added to a comparison.

    Exit codes: 0 done, 2 bad input, 1 failure, 75 stopped by a signal (or a closed pipe) with everything saved.
    """

    config: str = "mura"
    """Name of a configuration (mura, mura_baseline, paper, phantom) or a TOML file."""
    models: tuple[str, ...] = ("pdrunet", "unet", "fusionnet")
    """Networks to compare: names, or names with options of --model in quotes, as in "unet filters=32 depth=4". The
    first is the one that the others are compared with."""
    output: Path | None = None
    """Folder of the comparison; by default runs/compare_ and the configuration's name."""
    folds: int | None = None
    """Cross-validation: train every network in N folds, and compare the scores of all images. Without it, the test
    images are compared."""
    seeds: int = 3
    """Trainings of each network, with the seeds --seed, --seed + 1, and so on."""
    budget: Budget = "steps"
    """What is equal: steps gives every network --train.steps; time gives them to the first network, and to every other
    one as many as take equally long, by the time of a step measured here before training."""
    settings: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)

    @property
    def folder(self) -> Path:
        """The folder of the comparison, given or derived."""
        return self.output or Path("runs") / f"compare_{Path(self.config).stem}"

    @property
    def all_seeds(self) -> range:
        """The seeds to train with."""
        return range(self.settings.seed, self.settings.seed + self.seeds)


def parse(arguments: Sequence[str]) -> CompareOptions:
    """Parse `arguments`; the networks of the result are full names (`plan.full_name`).

    Raises:
        UserError: no `--config`, an unusable one, or a setting out of bounds.
        SystemExit: `--help` (0), or an option that does not exist or cannot be parsed (2, after a message).
    """
    name, settings = named_settings(arguments, optional=bool({"-h", "--help"} & set(arguments)))
    if cli.first_value(arguments, "--model.name") is not None:
        raise UserError('--model.name: name the networks with --models, as in --models pdrunet "unet filters=32"')
    default = CompareOptions(config=name or "mura", settings=settings)
    prog = cli.program("compare")
    options = tyro.cli(CompareOptions, prog=prog, args=list(arguments), default=default, use_underscores=False)
    if not 1 <= options.seeds <= MOST_SEEDS:
        raise UserError(f"--seeds {options.seeds}: give 1 to {MOST_SEEDS}")
    _ = TrainOptions(folds=options.folds).fold_numbers  # refuses numbers that are none
    # First what the networks share, then each network, so that a message is about one of them.
    check(dataclasses.replace(options.settings, model=ModelConfig()), "the command line")
    names = tuple(full_name(text, options.settings) for text in options.models)
    if len(names) < 2:
        raise UserError('--models: name two networks or more, as in --models pdrunet "unet filters=32"')
    seen: dict[ModelConfig, str] = {}
    for text in names:
        model = with_network(options.settings, text).model
        if model in seen:
            raise UserError(f"--models: {seen[model]!r} and {text!r} are the same network; name it once")
        seen[model] = text
    return dataclasses.replace(options, models=names)
