"""The training loop."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax.numpy as jnp

from pdrunet_jax.config import Config, settings_digest
from pdrunet_jax.data import overlay
from pdrunet_jax.data.dataset import Dataset
from pdrunet_jax.data.pipeline import TrainBatches, eval_batches, position_after
from pdrunet_jax.model.layers import State
from pdrunet_jax.runtime.checkpoint import Checkpoints
from pdrunet_jax.runtime.devices import Placement
from pdrunet_jax.runtime.digest import SETTINGS
from pdrunet_jax.runtime.files import sync, writing
from pdrunet_jax.runtime.malloc import trim_malloc
from pdrunet_jax.runtime.processes import Group
from pdrunet_jax.runtime.run_folder import RunFolder
from pdrunet_jax.runtime.stop import StopFlag
from pdrunet_jax.train.final import save_best, weights_options
from pdrunet_jax.train.progress import DivergedError, Progress, StepLog
from pdrunet_jax.train.step import Batch, Metrics, TrainState
from pdrunet_jax.train.tracking import Tracker
from pdrunet_jax.train.validate import Validation, validate


@dataclass(frozen=True)
class Training:
    """A run that is ready for its next step."""

    config: Config
    run: RunFolder
    dataset: Dataset
    outputs: int
    """Output channels of the network."""
    group: Group
    """The processes that train together. Only the main one writes to `run`."""
    place: Placement
    """The devices of all of them."""
    checkpoints: Checkpoints
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    eval_step: Callable[[State, State, Batch], Metrics]
    batches: TrainBatches
    state: TrainState
    progress: Progress
    resumed: bool
    """Whether state and progress are those of a checkpoint."""
    notes: Sequence[str] = ()
    """Sentences for the log on what training starts from."""


def train(training: Training, tracker: Tracker, stop: StopFlag) -> Progress | None:
    """Train to `config.train.steps`, or until `train.patience` runs out, or until asked to stop.

    Returns:
        Where training ended; None if it was asked to stop. Everything is saved in either case.

    Raises:
        DivergedError: the loss or a gradient was not finite; the state before that step is saved.
        RunError: the disk refused.
    """
    settings, batches, writes = training.config.train, training.batches, training.group.is_main
    state, progress = training.state, training.progress
    first, saved = progress.step, progress.step if training.resumed else -1
    samples = training.dataset.of("train")
    log = StepLog(training.run, samples, tracker, first, settings.batch_size, writes=writes)
    try:
        while True:
            # Validate. The result is part of this step's checkpoint.
            if progress.validation_due(settings) and not stop:
                log.flush(state)
                result = score_validation(training, state, stop)
                if result is not None:
                    progress = progress.scored(result.dice, settings)
                    keep_validation(training, progress, result, tracker)
                    save(training, state, progress, dice=result.dice)
                    saved = progress.step
                    if writes and progress.best_step == progress.step:
                        # Last: without a checkpoint there is no best.safetensors. A resumed run makes up for it.
                        save_best(training.run, training.config, training.dataset, training.outputs, state, progress)
                log.clock.restart()

            if stop.ask() or progress.finished(settings):
                break

            # Start the next step. The device computes it while the last one is logged.
            with log.clock.waiting_for_data():
                batch = next(batches)
            state, metrics = training.train_step(state, training.place.shard_batch(batch))
            log.add(progress, batches.index, metrics)
            progress = progress.advanced(batches.index)
            if progress.step == first + 1:
                trim_malloc()  # return the memory that compiling took
            log.report(state, progress, metrics, due=progress.log_due(settings))

            # Save between validations.
            if progress.save_due(settings):
                log.flush(state)
                save(training, state, progress)
                saved = progress.step

        # Done, or asked to stop: keep the last steps.
        log.flush(state)
        if saved < progress.step:
            save(training, state, progress)
    except DivergedError as error:
        # The state has not changed since the last good step. It is saved as if the run had been stopped there.
        if saved < error.progress.step:
            save(training, dataclasses.replace(state, diverged=jnp.zeros_like(state.diverged)), error.progress)
        raise
    if stop:
        tracker.say(f"asked to stop ({stop.signal}): saved at step {progress.step}; the same command resumes")
        return None
    if progress.stopped_early(settings) and progress.step < settings.steps:
        tracker.say(
            f"stopped early at step {progress.step}: no better Dice in {progress.stale} validations than "
            f"{progress.best_dice:.4f} at step {progress.best_step}; a higher --train.patience goes on"
        )
    return progress


def save(training: Training, state: TrainState, progress: Progress, dice: float | None = None) -> None:
    """Write the checkpoint of `progress.step`, after its metrics. Raises `RunError`."""
    position = training.batches.get_state() | position_after(progress.step)
    if training.group.is_main and training.run.metrics.exists():
        with writing(training.run.metrics):
            sync(training.run.metrics)
            sync(training.run.path)
    options = weights_options(training.config, training.dataset, training.outputs)
    extra = {**progress.to_dict(), "options": options, SETTINGS: settings_digest(training.config)}
    training.checkpoints.save(progress.step, state, position, extra, dice)
    if training.group.is_main:
        training.run.note_checkpoint()


def score_validation(training: Training, state: TrainState, stop: StopFlag) -> Validation | None:
    """Score the current weights on the validation images; None if asked to stop."""
    config, place = training.config, training.place
    images = eval_batches(
        training.dataset,
        "val",
        config.data,
        batch_size=place.eval_batch_size(config.train.eval_batch_size or config.train.batch_size),
        channels=config.model.in_channels,
        process_shard=place.process_shard,
    )
    return validate(
        training.eval_step,
        *state.weights,
        images,
        place=place,
        names=tuple(sample.id for sample in training.dataset.of("val")),
        cases=config.train.samples,
        soft=config.data.soft_masks,
        stop=stop,
    )


def keep_validation(training: Training, progress: Progress, result: Validation, tracker: Tracker) -> None:
    """Report a validation and draw its samples. Raises `RunError`."""
    tracker.validation(progress.step, result.metrics(), result.pictures())
    if training.group.is_main and result.cases:
        path = training.run.samples / f"step_{progress.step:06}.png"
        with writing(path):
            training.run.samples.mkdir(exist_ok=True)
            overlay.save(result.sheet(), path)
