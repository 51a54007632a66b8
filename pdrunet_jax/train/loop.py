"""python -m pdrunet_jax.train --config NAME: train, validate, save; started again, resume exactly.

The heavy imports are inside the functions: a signal that arrives while they load is then already minded.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

from pdrunet_jax.runtime.processes import Group
from pdrunet_jax.runtime.stop import StopFlag
from pdrunet_jax.train.progress import Clock, Progress

if TYPE_CHECKING:
    from pdrunet_jax.config import Config
    from pdrunet_jax.data.dataset import Dataset
    from pdrunet_jax.runtime.devices import Placement
    from pdrunet_jax.runtime.run_folder import RunFolder
    from pdrunet_jax.train.tracking import Tracker


def train(
    config: "Config",
    run: "RunFolder",
    dataset: "Dataset",
    outputs: int,
    stop: StopFlag,
    group: Group,
    place: "Placement",
) -> "Tracker | None":
    """Train to `config.train.steps` or until asked to stop, from the newest checkpoint in `run` if there is one.

    Everything is saved when this returns: the tracker, still open for the final scores, or None if it was stopped. Of
    the processes of a `group`, which all do the same with their shares of each batch, only the first writes to `run`
    and speaks. `place` is for the devices of all of them.

    Raises:
        RunError: the loss or a gradient was not finite, or the loss spiked, or the disk refused.
        UserError: the checkpoints are of other data, or none of them is intact.
    """
    import jax.numpy as jnp

    from pdrunet_jax.data.pipeline import eval_batches, position_after, train_batches
    from pdrunet_jax.model.load import start_from
    from pdrunet_jax.runtime.checkpoint import GroupCheckpoints
    from pdrunet_jax.runtime.malloc import trim_malloc
    from pdrunet_jax.train.final import save_best
    from pdrunet_jax.train.progress import Recent, write_skipped
    from pdrunet_jax.train.step import build_model, create_state, make_eval_step, make_train_step
    from pdrunet_jax.train.tracking import Silent, Tracker
    from pdrunet_jax.train.validate import validate

    settings, channels = config.train, config.model.in_channels
    checkpoints = GroupCheckpoints(group, run.checkpoints, settings.keep_latest, settings.keep_best)
    model = build_model(config, outputs, place.mesh)
    if settings.weights is not None and group.is_main and checkpoints.latest_step() is None:
        start_from(model, settings.weights)
    graphdef, state = create_state(config, model)
    train_step = make_train_step(config, graphdef, outputs, place.mesh)
    eval_step = make_eval_step(config, graphdef, outputs, place.mesh)
    batches = train_batches(
        dataset,
        config.data,
        batch_size=settings.batch_size,
        channels=channels,
        seed=config.seed,
        process_shard=place.process_shard,
    )
    progress, step = Progress(data=dataset.fingerprint()), 0
    if restored := checkpoints.restore(state):
        step, state = restored.step, restored.state
        batches.set_state(restored.position)
        progress = progress.resumed(restored.extra, run.path)
        if group.is_main:
            write_skipped(run, progress)
    state = place.replicate(group.broadcast_arrays(state))
    tracker = Tracker(run, config, step=step, class_names=dataset.class_names) if group.is_main else Silent()
    if restored:
        tracker.say(f"resumed {run.path} at step {step}")
    elif settings.weights is not None:
        tracker.say(f"started from the weights of {settings.weights}")
    saved = step if restored else -1
    first = logged = step
    pending: tuple[int, Any, str] | None = None  # a step to be logged, what it returned, and the samples' digest
    recent = Recent(run, dataset, step, writes=group.is_main)
    clock = Clock()

    def report() -> None:
        """Log what is pending; it waits for that step alone, while the device is busy with the next."""
        nonlocal pending, logged
        if pending is None:
            return
        (at, values, sequence), pending = pending, None
        if "spike" in values or bool(values["diverged"]):
            settle()
        tracker.log(at, _report(values, sequence, len(progress.skipped), clock, (at - logged) * settings.batch_size))
        logged = at

    def settle() -> None:
        """Wait for the device, log what is pending, and see whether it had to skip a batch or to halt."""
        nonlocal progress
        report()
        if bool(state.diverged):
            good = int(state.step)
            before = dataclasses.replace(state, diverged=jnp.zeros_like(state.diverged))
            position = {**batches.get_state(), **position_after(good)}
            if good > saved:
                checkpoints.save(good, before, position, recent.before(good).to_dict())
            raise recent.error(good)
        progress = recent.settle(progress)

    def save(val_dice: float | None = None) -> None:
        settle()
        checkpoints.save(step, state, batches.get_state(), progress.to_dict(), val_dice)

    try:
        while True:
            due = (step % settings.eval_every == 0 or step == settings.steps) and progress.validated < step
            if due and not stop:
                settle()
                images = eval_batches(
                    dataset,
                    "val",
                    config.data,
                    batch_size=place.eval_batch_size(settings.eval_batch_size or settings.batch_size),
                    channels=channels,
                    process_shard=place.process_shard,
                )
                result = validate(
                    eval_step,
                    state.ema or state.params,
                    state.stats,
                    images,
                    place=place,
                    names=tuple(sample.id for sample in dataset.of("val")),
                    cases=settings.samples,
                    soft=config.data.soft_masks,
                    stop=stop,
                )
                if result is not None:
                    progress = progress.scored(step, result.dice)
                    tracker.validation(step, result.metrics(), _pictures(result))
                    if group.is_main:
                        _save_samples(run, step, result)
                    if group.is_main and progress.best_step == step:
                        save_best(run, config, dataset, outputs, state, progress)
                    save(result.dice)
                    saved = step
                clock.restart()
            if stop.ask() or step == settings.steps:
                break

            with clock.waiting_for_data():
                batch = next(batches)
            state, values = train_step(state, place.shard_batch(batch))
            recent.add(batches.index, values, progress)
            step += 1
            progress = progress.seen(batches.index)
            if step == first + 1:
                trim_malloc()  # what compiling took
            report()
            if step % settings.log_every == 0 or step == settings.steps:
                pending = step, values, progress.sequence
                if "spike" in values:
                    report()  # at once: the batches skipped so far are counted up to this step
            if step % settings.save_every == 0 and step % settings.eval_every and step < settings.steps:
                save()  # where a validation is due, its result goes into the checkpoint
                saved = step
        if saved < step:
            save()
        if stop:
            tracker.say(f"asked to stop ({stop.signal}): saved at step {step}; the same command resumes")
            tracker.finish("stopped")
            return None
        return tracker
    except BaseException as error:
        tracker.finish("failed", str(error))
        raise


def _report(values: Any, sequence: str, skipped: int, clock: Clock, images: int) -> dict[str, Any]:
    loss = float(values["loss"])  # waits for the step, so that the time below is the whole of it
    seconds, waited = clock.lap()
    return {
        "train/loss": loss,
        "train/dice": values["dice"],
        "train/grad_norm": values["grad_norm"],
        "train/learning_rate": values["learning_rate"],
        "time/images_per_second": images / seconds,
        "time/data_wait": waited,
        "data/sequence": sequence,
        **({"train/skipped": skipped} if "spike" in values else {}),
    }


def _pictures(result: Any) -> list[Any]:
    from pdrunet_jax.train.wandb_run import Picture

    return [Picture(caption, image, prediction, truth) for image, truth, prediction, caption in result.cases]


def _save_samples(run: "RunFolder", step: int, result: Any) -> None:
    from pdrunet_jax.data import overlay as pictures
    from pdrunet_jax.runtime.files import writing

    if result.cases:
        path = run.samples / f"step_{step:06}.png"
        with writing(path):
            run.samples.mkdir(exist_ok=True)
            pictures.save(result.sheet(), path)
