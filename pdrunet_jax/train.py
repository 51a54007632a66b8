"""python -m pdrunet_jax.train --config NAME: train, validate, save; started again, resume exactly.

The heavy imports are inside the functions: a signal that arrives while they load is then already minded.
"""

import dataclasses
import sys
from typing import TYPE_CHECKING, Any

from pdrunet_jax import cli
from pdrunet_jax.errors import UserError
from pdrunet_jax.progress import Clock, Progress
from pdrunet_jax.stopping import StopFlag

if TYPE_CHECKING:
    from pdrunet_jax.config import Config
    from pdrunet_jax.data.dataset import Dataset
    from pdrunet_jax.runfolder import RunFolder
    from pdrunet_jax.step import TrainState
    from pdrunet_jax.tracking import Tracker


def main() -> int:
    """The command; returns its exit code."""
    with StopFlag(last=True) as stop:
        from pdrunet_jax import options
        from pdrunet_jax.runfolder import RunFolder, open_run

        arguments = options.parse(sys.argv[1:])
        if arguments.verify is not None:
            from pdrunet_jax.verify import verify

            return verify(arguments.verify)
        RunFolder(arguments.run_folder).require_free()  # before JAX is loaded, which takes longer than this answer may
        from pdrunet_jax import startup
        from pdrunet_jax.data.dataset import open_dataset
        from pdrunet_jax.finish import finish

        config = arguments.settings
        device = startup.prepare(config.train.precision, config.train.deterministic)
        print(device, flush=True)
        dataset = open_dataset(config.data)
        for note in dataset.notes:
            print(note, flush=True)
        outputs = _outputs(config, dataset)
        if not dataset.of("val"):
            raise UserError(
                f"{dataset.root} has no validation images, which choose the best weights: raise --data.val-fraction, "
                "or give some patients the split val"
            )
        if config.train.weights is not None and not RunFolder(arguments.run_folder).config.exists():
            from pdrunet_jax.loading import load_same

            # Before the folder is made, which would hold on to settings that cannot be used.
            load_same(config.train.weights, {**dataclasses.asdict(config.model), "outputs": outputs})
        run = open_run(arguments.run_folder, config, device)
        with run.lock():
            tracker = None if stop else train(config, run, dataset, outputs, stop)
            if tracker is not None:
                finish(config, run, dataset, tracker, stop)
        return cli.STOPPED if stop else 0


def train(config: "Config", run: "RunFolder", dataset: "Dataset", outputs: int, stop: StopFlag) -> "Tracker | None":
    """Train to `config.train.steps` or until asked to stop, from the newest checkpoint in `run` if there is one.

    Everything is saved when this returns: the tracker, still open for the final scores, or None if it was stopped.

    Raises:
        RunError: the loss or a gradient was not finite, or the loss spiked, or the disk refused.
        UserError: the checkpoints are of other data, or none of them is intact.
    """
    import jax.numpy as jnp

    from pdrunet_jax.allocator import give_back
    from pdrunet_jax.checkpoint import Checkpoints
    from pdrunet_jax.data.pipeline import eval_batches, position_after, train_batches
    from pdrunet_jax.divergence import Recent, write_skipped
    from pdrunet_jax.loading import start_from
    from pdrunet_jax.step import build_model, create_state, make_eval_step, make_train_step
    from pdrunet_jax.tracking import Tracker
    from pdrunet_jax.validation import validate

    settings, channels = config.train, config.model.in_channels
    checkpoints = Checkpoints(run.checkpoints, settings.keep_latest, settings.keep_best)
    model = build_model(config, outputs)
    if settings.weights is not None and checkpoints.latest_step() is None:
        start_from(model, settings.weights)
    graphdef, state = create_state(config, model)
    train_step = make_train_step(config, graphdef, outputs)
    eval_step = make_eval_step(config, graphdef, outputs)
    batches = train_batches(dataset, config.data, batch_size=settings.batch_size, channels=channels, seed=config.seed)
    progress, step = Progress(data=dataset.fingerprint()), 0
    if restored := checkpoints.restore(state):
        step, state = restored.step, restored.state
        batches.set_state(restored.position)
        progress = progress.resumed(restored.extra, run.path)
        write_skipped(run, progress)
    tracker = Tracker(run, config, step=step, class_names=dataset.class_names)
    if restored:
        tracker.say(f"resumed {run.path} at step {step}")
    elif settings.weights is not None:
        tracker.say(f"started from the weights of {settings.weights}")
    saved = step if restored else -1
    first = logged = step
    pending: tuple[int, Any, str] | None = None  # a step to be logged, what it returned, and the samples' digest
    recent = Recent(run, dataset, step)
    clock = Clock()

    def report() -> None:
        """Log what is pending; it waits for that step alone, while the device is busy with the next."""
        nonlocal pending, logged
        if pending is None:
            return
        (at, values, sequence), pending = pending, None
        if "spike" in values or bool(values["halted"]):
            settle()
        tracker.log(at, _report(values, sequence, len(progress.skipped), clock, (at - logged) * settings.batch_size))
        logged = at

    def settle() -> None:
        """Wait for the device, log what is pending, and see whether it had to skip a batch or to halt."""
        nonlocal progress
        report()
        if bool(state.halted):
            good = int(state.step)
            before = dataclasses.replace(state, halted=jnp.zeros_like(state.halted))
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
                    batch_size=settings.eval_batch_size or settings.batch_size,
                    channels=channels,
                )
                result = validate(
                    eval_step,
                    state.ema or state.params,
                    state.stats,
                    images,
                    names=tuple(sample.id for sample in dataset.of("val")),
                    cases=settings.samples,
                    soft=config.data.soft_masks,
                    stop=stop,
                )
                if result is not None:
                    progress = progress.scored(step, result.dice)
                    tracker.validation(step, result.metrics(), _pictures(result))
                    _save_samples(run, step, result)
                    if progress.best_step == step:
                        _save_best(run, config, dataset, outputs, state, progress)
                    save(result.dice)
                    saved = step
                clock.restart()
            if stop or step == settings.steps:
                break

            with clock.waiting_for_data():
                batch = next(batches)
            state, values = train_step(state, batch)
            recent.add(batch["index"], values, progress)
            step += 1
            progress = progress.seen(batch["index"])
            if step == first + 1:
                give_back()  # what compiling took
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


def _outputs(config: "Config", dataset: "Dataset") -> int:
    """`model.outputs`, checked against the classes of the dataset, or what follows from them."""
    classes = len(dataset.class_names)
    outputs = config.model.outputs or dataset.outputs
    if max(outputs - 1, 1) != classes:
        raise UserError(
            f"--model.outputs {outputs} does not fit the {classes} classes of {dataset.root} "
            f"({', '.join(dataset.class_names)}): leave it out, or give {classes + 1}"
        )
    if config.data.soft_masks and outputs != 1:
        raise UserError("data.soft_masks needs one output; set --model.outputs 1 or leave soft masks out")
    return outputs


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


def _save_best(
    run: "RunFolder", config: "Config", dataset: "Dataset", outputs: int, state: "TrainState", progress: Progress
) -> None:
    """Write best.safetensors, under the public names and with what is needed to use it."""
    from pdrunet_jax.integrity import CONTENT, content_digest
    from pdrunet_jax.weights import to_public, write_safetensors

    arrays = to_public(state.ema or state.params, state.stats)
    options = {
        "in_channels": config.model.in_channels,
        "outputs": outputs,
        "filters": config.model.filters,
        "shortcut": config.model.shortcut,
        "norm": config.model.norm,
        "dropout": config.model.dropout,
        "size": list(config.data.height_width),
        "class_names": list(dataset.class_names),
        "step": progress.best_step,
        "val_dice": progress.best_dice,
    }
    write_safetensors(run.best, arrays, {**options, CONTENT: content_digest(arrays, options)})


def _pictures(result: Any) -> list[Any]:
    from pdrunet_jax.wandb_run import Picture

    return [Picture(caption, image, prediction, truth) for image, truth, prediction, caption in result.cases]


def _save_samples(run: "RunFolder", step: int, result: Any) -> None:
    from pdrunet_jax import pictures
    from pdrunet_jax.files import writing

    if result.cases:
        path = run.samples / f"step_{step:06}.png"
        with writing(path):
            run.samples.mkdir(exist_ok=True)
            pictures.save(result.sheet(), path)


if __name__ == "__main__":
    cli.run(main)
