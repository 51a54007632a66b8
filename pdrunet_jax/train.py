"""python -m pdrunet_jax.train --config NAME: train, validate, save; started again, resume exactly.

The heavy imports are inside the functions: a signal that arrives while they load is then already minded.
"""

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

from pdrunet_jax import cli
from pdrunet_jax.errors import RunError, UserError
from pdrunet_jax.progress import Clock, Progress
from pdrunet_jax.stopping import StopFlag

if TYPE_CHECKING:
    from pdrunet_jax.config import Config
    from pdrunet_jax.data.dataset import Dataset
    from pdrunet_jax.runfolder import RunFolder
    from pdrunet_jax.step import TrainState


def main() -> int:
    """The command; returns its exit code."""
    with StopFlag() as stop:
        from pdrunet_jax import options, startup
        from pdrunet_jax.data.dataset import open_dataset
        from pdrunet_jax.runfolder import open_run

        arguments = options.parse(sys.argv[1:])
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
        run = open_run(arguments.run_folder, config, device)
        with run.lock():
            if not stop:
                train(config, run, dataset, outputs, stop)
            if not stop:
                finish(config, run, dataset)
        return cli.STOPPED if stop else 0


def train(config: "Config", run: "RunFolder", dataset: "Dataset", outputs: int, stop: StopFlag) -> None:
    """Train to `config.train.steps` or until asked to stop, from the newest checkpoint in `run` if there is one.

    Everything is saved when this returns.

    Raises:
        RunError: the loss or a gradient was not finite, or the disk refused.
        UserError: the checkpoints are of other data, or none of them is intact.
    """
    from pdrunet_jax.checkpoint import Checkpoints
    from pdrunet_jax.data.pipeline import eval_batches, train_batches
    from pdrunet_jax.step import build_model, create_state, make_eval_step, make_train_step
    from pdrunet_jax.tracking import Tracker
    from pdrunet_jax.validation import validate

    settings, channels = config.train, config.model.in_channels
    graphdef, state = create_state(config, build_model(config, outputs))
    train_step = make_train_step(config, graphdef, outputs)
    eval_step = make_eval_step(config, graphdef, outputs)
    batches = train_batches(dataset, config.data, batch_size=settings.batch_size, channels=channels, seed=config.seed)
    checkpoints = Checkpoints(run.checkpoints, settings.keep_latest, settings.keep_best)
    progress, step = Progress(data=dataset.fingerprint()), 0
    if restored := checkpoints.restore(state):
        step, state = restored.step, restored.state
        batches.set_state(restored.position)
        progress = progress.resumed(restored.extra, run.path)
    tracker = Tracker(run, config, step=step, class_names=dataset.class_names)
    if restored:
        tracker.say(f"resumed {run.path} at step {step}")
    saved = step if restored else -1
    recent: list[Any] = []  # sample indices of the steps since the device was last waited for
    clock = Clock()

    def save(val_dice: float | None = None) -> None:
        if bool(state.halted):
            raise _not_finite(run, state, step, recent, dataset)
        checkpoints.save(step, state, batches.get_state(), dataclasses.asdict(progress), val_dice)

    try:
        while True:
            due = (step % settings.eval_every == 0 or step == settings.steps) and progress.validated < step
            if due and not stop:
                if bool(state.halted):
                    raise _not_finite(run, state, step, recent, dataset)
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
                )
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
            step += 1
            recent.append(batch["index"])
            progress = progress.seen(batch["index"])
            if step % settings.log_every == 0 or step == settings.steps:
                # Only here and before a checkpoint does the program wait for the device.
                if bool(state.halted):
                    raise _not_finite(run, state, step, recent, dataset)
                tracker.log(step, _report(values, progress, clock, len(recent) * settings.batch_size))
                recent.clear()
            if step % settings.save_every == 0 and step % settings.eval_every and step < settings.steps:
                save()  # where a validation is due, its result goes into the checkpoint
                saved = step
        if saved < step:
            save()
        if stop:
            tracker.say(f"asked to stop ({stop.signal}): saved at step {step}; the same command resumes")
        tracker.finish("stopped" if stop else "finished")
    except BaseException as error:
        tracker.finish("failed", str(error))
        raise


def finish(config: "Config", run: "RunFolder", dataset: "Dataset") -> None:
    """Score the best weights on the test images, write the report, and print the scores last."""
    from pdrunet_jax import scores
    from pdrunet_jax.baseline import threshold_baseline
    from pdrunet_jax.evaluation import evaluate_split, write_evaluation
    from pdrunet_jax.loading import load_model
    from pdrunet_jax.report import write_report

    split = "test" if dataset.of("test") else "val"
    result = evaluate_split(load_model(run.path), dataset, split, config.data, batch_size=config.train.batch_size)
    write_evaluation(result, run.path / "evaluation" / split, {"weights": str(run.best)})
    print(scores.table(result.summary))
    if len(dataset.class_names) == 1:
        print(f"the best global threshold scores {threshold_baseline(dataset, split):.3f} on the same images")
    print(f"report: {write_report(run.path)}")
    print(result.line)


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


def _report(values: Any, progress: Progress, clock: Clock, images: int) -> dict[str, Any]:
    loss = float(values["loss"])  # waits for the step, so that the time below is the whole of it
    seconds, waited = clock.lap()
    return {
        "train/loss": loss,
        "train/dice": values["dice"],
        "train/grad_norm": values["grad_norm"],
        "train/learning_rate": values["learning_rate"],
        "time/images_per_second": images / seconds,
        "time/data_wait": waited,
        "data/sequence": progress.sequence,
    }


def _not_finite(run: "RunFolder", state: "TrainState", step: int, recent: list[Any], dataset: "Dataset") -> RunError:
    """Write down which samples were in the batch that gave a loss or gradient that is not finite."""
    from pdrunet_jax.files import atomic_write

    good = int(state.step)
    samples = [dataset.of("train")[int(index)].id for index in recent[good - step]]
    path = run.path / "not_finite.json"
    atomic_write(path, json.dumps({"step": good + 1, "samples": samples}, indent=2) + "\n")
    return RunError(
        f"the loss or a gradient of step {good + 1} is not finite; the update was not made. Its samples are in {path}. "
        "A lower --optim.learning-rate or --optim.clip-norm 1 may help; earlier checkpoints are intact."
    )


def _save_best(
    run: "RunFolder", config: "Config", dataset: "Dataset", outputs: int, state: "TrainState", progress: Progress
) -> None:
    """Write best.safetensors, under the public names and with what is needed to use it."""
    from pdrunet_jax.weights import to_public, write_safetensors

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
    write_safetensors(run.best, to_public(state.ema or state.params, state.stats), options)


def _pictures(result: Any) -> list[Any]:
    from pdrunet_jax.wandb_run import Picture

    return [Picture(caption, image, prediction, truth) for image, truth, prediction, caption in result.cases]


def _save_samples(run: "RunFolder", step: int, result: Any) -> None:
    from pdrunet_jax import pictures

    if result.cases:
        run.samples.mkdir(exist_ok=True)
        pictures.save(result.sheet(), run.samples / f"step_{step:06}.png")


if __name__ == "__main__":
    cli.run(main)
