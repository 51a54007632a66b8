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
    optim = dataclasses.replace(config.optim, restarts=tuple(each for each in config.optim.restarts if each < step))
    shortened = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=step), optim=optim)
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
    step, steps, optim = newest_step(run), config.train.steps, config.optim
    if (old.train.steps, old.optim.restarts) != (steps, optim.restarts) and steps > step:
        before, after = (float(make_schedule(each.optim, each.train.steps)(step)) for each in (old, config))
        if before != after:
            first = max((each for each in optim.restarts if each <= step), default=0)
            last = min((each for each in optim.restarts if each > step), default=steps)
            span = f"goes from step {first} to {last}" if optim.restarts else f"spans the whole run, now {steps} steps"
            here = " ".join(str(each) for each in (*optim.restarts, step) if each <= step)
            offered = step and step not in optim.restarts
            choice = f". To start it again here instead: --optim.restarts {here}" if offered else ""
            rate = f"the learning rate goes on at {after:.3g}, not {before:.3g}"
            lines.append(f"the {optim.schedule} schedule {span}: {rate}{choice}")
    return lines
