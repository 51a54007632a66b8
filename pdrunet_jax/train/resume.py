"""Changes of settings when a run goes on: a run may be prolonged, shortened, or finished at its newest checkpoint."""

import dataclasses

from pdrunet_jax.config import Config, check, diff, read
from pdrunet_jax.runtime.checkpoint import checkpoint_steps
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.processes import Group
from pdrunet_jax.runtime.run_folder import RunFolder
from pdrunet_jax.train.optim import make_schedule


def end_here(config: Config, run: RunFolder, group: Group) -> Config:
    """The settings with which `run` ends at its newest checkpoint (`--finish`), the same in all processes.

    Raises `UserError` if there is no checkpoint, or if a run cannot end there: in the middle of its warm-up.
    """
    step = int(group.broadcast(str(newest_step(run) if group.is_main else 0)))
    if not step:
        raise UserError(f"--finish: {run.path} has no checkpoint to score; train first, without --finish")
    shortened = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=step))
    return check(shortened, f"--finish at step {step}")


def newest_step(run: RunFolder) -> int:
    """Step of the newest checkpoint, damaged or not; 0 if there is none."""
    return max(checkpoint_steps(run.checkpoints), default=0)


def require_ahead(run: RunFolder, config: Config) -> None:
    """Raise `UserError` if `run` is past the last step of `config`."""
    step = newest_step(run)
    if step > config.train.steps:
        raise UserError(
            f"{run.path} is at step {step}, and --train.steps {config.train.steps} is before that: give {step} or "
            "more, or --finish to score it as it is"
        )


def describe_changes(run: RunFolder, config: Config) -> list[str]:
    """Sentences on the settings that differ from those that `run` had so far, and on what that does to its rate."""
    if not run.config_file.is_file():
        return []
    old = read(run.config_file)
    lines = [f"changed {line}" for line in diff(old, config)]
    step, steps = newest_step(run), config.train.steps
    if old.train.steps != steps > step:
        before, after = (float(make_schedule(each.optim, each.train.steps)(step)) for each in (old, config))
        if before != after:
            lines.append(
                f"the {config.optim.schedule} schedule spans the whole run, now {steps} steps: the learning rate goes "
                f"on at {after:.3g}, not {before:.3g}"
            )
    return lines
