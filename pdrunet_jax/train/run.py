"""A training run from its settings to its final scores: checks, run folder, devices, processes."""

import dataclasses
import tomllib
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import jax
import tomli_w
from jax.sharding import Mesh

from pdrunet_jax.config import MAY_CHANGE, OF_A_PROCESS, Config, diff, parse, read, settings_digest, to_toml
from pdrunet_jax.data.dataset import Dataset, require_same_data
from pdrunet_jax.data.pipeline import open_training_data, train_batches
from pdrunet_jax.data.split import one_patient
from pdrunet_jax.evaluate.training_images import write_training_images
from pdrunet_jax.model.execution import Execution, note_on
from pdrunet_jax.model.folds import started_folds
from pdrunet_jax.model.load import load_weights
from pdrunet_jax.model.pixels import foreground_classes
from pdrunet_jax.model.sides import swapped
from pdrunet_jax.model.start import load_same, start_from
from pdrunet_jax.runtime import cli
from pdrunet_jax.runtime.checkpoint import Checkpoints, checkpoint_steps, choose_intact, read_meta
from pdrunet_jax.runtime.devices import Placement, describe_device, make_mesh, require_divisible
from pdrunet_jax.runtime.digest import SETTINGS
from pdrunet_jax.runtime.errors import DataError, UserError
from pdrunet_jax.runtime.files import atomic_write, is_present, writing
from pdrunet_jax.runtime.opening import read_text
from pdrunet_jax.runtime.processes import Group
from pdrunet_jax.runtime.run_folder import RunFolder, environment
from pdrunet_jax.runtime.stop import StopFlag
from pdrunet_jax.train.agreed_stop import AgreedStop
from pdrunet_jax.train.class_weights import balance, balanced_weights, describe_weights
from pdrunet_jax.train.final import final_evaluation, save_best
from pdrunet_jax.train.freeze import describe_frozen
from pdrunet_jax.train.loop import Training, train
from pdrunet_jax.train.losses import make_loss
from pdrunet_jax.train.options import TrainOptions
from pdrunet_jax.train.programs import StepPrograms
from pdrunet_jax.train.progress import Progress
from pdrunet_jax.train.resume import describe_changes, end_here, require_ahead
from pdrunet_jax.train.step import build_model, create_state
from pdrunet_jax.train.tracking import Tracker


def run(
    arguments: TrainOptions,
    group: Group,
    stop: StopFlag,
    check: Callable[[Config, Dataset], None] = lambda config, dataset: None,
) -> int:
    """Check everything, then train and score. Returns the exit code.

    The main process calls `check` with the settings and the data before anything is written.
    """
    config, folder = arguments.settings, RunFolder(arguments.run_folder)
    if arguments.finish:
        config = end_here(config, folder, group)
    require_same_settings(group, config)

    # Devices and data. Nothing is written before all processes agree on them.
    device = describe_device(config.train.precision, config.train.deterministic)
    mesh, devices = choose_devices(config.train.batch_size)
    device = ", ".join(filter(None, (device, devices)))
    group.log(device)
    Execution.of(config.model.conv)  # refuses a path that does not run here, before anything is written
    if note := note_on(config.model.conv):
        group.log(note)
    with group.main_first():  # the main process may have to draw phantoms
        dataset = open_training_data(config.data)
    require_same_data(group, dataset)
    for note in dataset.notes:
        group.log(note)
    outputs = choose_outputs(config, dataset)
    require_validation(dataset)
    config = settle_flips(config, dataset)
    facts: dict[str, Any] = {}
    if config.loss.class_weights == "balanced":
        weights = balanced_weights(dataset)
        facts["class_weights"] = list(weights)
        group.log(describe_weights(weights, dataset))
    make_loss(balance(config, dataset).loss, outputs, multilabel=dataset.multilabel)  # refuses what does not fit
    if config.train.freeze:
        group.log(describe_frozen(config.model, outputs, config.train.freeze))
    if group.is_main:
        check(config, dataset)
    if group.is_main and config.train.weights is not None and not folder.config_file.exists():
        # Before the folder is made: it would record settings that cannot be used.
        load_same(config.train.weights, dataclasses.asdict(config.model))
    group.wait()

    # Train, then score the best weights. The run folder stays locked, and W&B is closed before the last line.
    agreed = AgreedStop(stop) if group.count > 1 else stop
    changes = describe_changes(folder, config) if group.is_main else []
    folder = open_run(arguments.run_folder, config, device, facts) if group.is_main else folder
    line = None
    with folder.lock() if group.is_main else nullcontext():
        if agreed:
            return cli.STOPPED
        training = prepare(config, folder, dataset, outputs, group, Placement(mesh))
        if group.is_main:
            write_training_images(folder, dataset, config.train.weights)
        step, names = training.progress.step, dataset.class_names
        with Tracker(folder if group.is_main else None, config, step=step, class_names=names) as tracker:
            if training.resumed:
                tracker.say("\n".join([f"resumed {folder.path} at step {step}", *changes]))
            elif config.train.weights is not None:
                tracker.say("\n".join([f"started from the weights of {config.train.weights}", *training.notes]))
            with closing(training.batches):
                end = train(training, tracker, agreed)
            if end is None:
                tracker.status = "stopped"
            elif group.is_main:
                line = final_evaluation(config, folder, dataset, end, tracker, stop)
    if line is not None:
        print(line, flush=True)
    return cli.STOPPED if stop or agreed else 0


def prepare(
    config: Config, folder: RunFolder, dataset: Dataset, outputs: int, group: Group, place: Placement
) -> Training:
    """Build network, steps and batches, and restore the newest checkpoint if there is one.

    Raises:
        UserError: the checkpoints or best weights are of other data or settings, no checkpoint is intact, or all are
            missing.
    """
    settings = config.train
    exchanged = swapped(dataset.class_names, dataset.swap_on_flip or ())
    programs = StepPrograms(balance(config, dataset), outputs, place.mesh, exchanged)
    checkpoints = Checkpoints(folder.checkpoints, settings.keep_latest, settings.keep_best, group)
    model, notes = build_model(config, outputs), []
    if settings.weights is not None and group.is_main and checkpoints.latest_step() is None:
        notes = start_from(model, settings.weights, dataset.class_names)
    graphdef, state = create_state(config, model)
    batches = train_batches(
        dataset,
        config.data,
        batch_size=settings.batch_size,
        channels=config.model.in_channels,
        seed=config.seed,
        process_shard=place.process_shard,
    )
    fingerprint = dataset.fingerprint()
    progress = Progress(data=fingerprint)
    restored = checkpoints.restore(state)
    if restored is not None:
        state = restored.state
        digest = settings_digest(config)
        progress = Progress.resumed(restored.extra, restored.step, fingerprint, digest, folder.path)
        if restored.position.get("batches_done", progress.step) != progress.step:
            raise UserError(
                f"the checkpoint of step {progress.step} in {folder.path} states another position in the data"
            )
        batches.set_state(restored.position)
        if group.is_main:
            try:
                best = load_weights(folder.best).options.get("step")
            except DataError:  # of another run
                raise
            except UserError:  # missing or damaged
                best = None
            if progress.best_step == progress.step != best and progress.step:  # the run was killed just before this
                save_best(folder, config, dataset, outputs, state, progress)
    elif group.is_main:
        folder.require_new(first_save(config))
    return Training(
        config,
        folder,
        dataset,
        outputs,
        group,
        place,
        checkpoints,
        programs.train_step(graphdef),
        programs.eval_step(graphdef),
        batches,
        place.replicate(group.broadcast_arrays(state)),
        progress,
        resumed=restored is not None,
        notes=notes,
    )


def require_validation(dataset: Dataset) -> None:
    """Raise `UserError` if there are no validation images."""
    if dataset.of("val"):
        return
    what = f"{dataset.root} has no validation images, which select the best weights"
    patients = {sample.patient for sample in dataset.samples}
    if len(patients) == 1:
        raise UserError(f"{what}: {one_patient(len(dataset.samples), patients.pop(), dataset.patients_from)}")
    raise UserError(f"{what}: raise --data.val-fraction, or give some patients the split val")


def settle_flips(config: Config, dataset: Dataset) -> Config:
    """The settings with what mirroring training images means for the classes of `dataset`.

    Pairs of classes that change places are recorded, so that a run resumes with the same ones; flips are switched off
    if such pairs are unknown.
    """
    if not (config.augment.flip_horizontal or config.augment.flip_vertical):
        return config
    if dataset.swap_on_flip is None:
        without = dataclasses.replace(config.augment, flip_horizontal=0.0, flip_vertical=0.0)
        return dataclasses.replace(config, augment=without)
    if dataset.swap_on_flip:
        return dataclasses.replace(config, data=dataclasses.replace(config.data, swap_on_flip=dataset.swap_on_flip))
    return config


def choose_outputs(config: Config, dataset: Dataset) -> int:
    """The number of output channels: `model.outputs`, or as the classes need. Raises `UserError` if they disagree."""
    classes = len(dataset.class_names)
    outputs = config.model.outputs or dataset.outputs
    if foreground_classes(outputs, multilabel=dataset.multilabel) != classes:
        raise UserError(
            f"--model.outputs {outputs} does not fit the {classes} classes of {dataset.root} "
            f"({', '.join(dataset.class_names)}): leave it out, or give {dataset.outputs}"
        )
    if config.data.soft_masks and outputs != 1:
        raise UserError("data.soft_masks needs one output; set --model.outputs 1 or switch soft masks off")
    return outputs


def choose_devices(batch_size: int) -> tuple[Mesh | None, str]:
    """Choose the devices to train on, and describe them unless there is only one.

    A single process takes as many of its devices as divide the batch; several processes take all. One device needs no
    mesh.

    Raises:
        UserError: the processes' devices cannot share the batch evenly.
    """
    devices, processes = jax.devices(), jax.process_count()
    total = used = len(devices)
    if processes == 1:
        used = max(n for n in range(1, total + 1) if batch_size % n == 0)
    if used == 1:
        return None, f"1 of {total} devices: no other number divides train.batch_size {batch_size}" if total > 1 else ""
    mesh = make_mesh(devices[:used])
    require_divisible(mesh, batch_size)
    if processes > 1:
        each = total // processes
        return mesh, f"{processes} processes with {each} device{'s' if each > 1 else ''} each"
    if used < total:
        return mesh, f"{used} of {total} devices: more do not divide train.batch_size {batch_size}"
    return mesh, f"{used} devices"


def record(run: RunFolder, config: Config, device: str = "", facts: Mapping[str, Any] | None = None) -> None:
    """Write config.toml, or compare `config` with the settings that the run was started with.

    `facts` go into its section on the environment. A restart adds its time and the settings and versions that changed.
    Raises `UserError` with the differences, or if the run is past its last step, or if the existing config.toml cannot
    be read, or is gone and the rest of the run is of other settings.
    """
    header = "Settings of this run, written by the program. Start it again with the same settings to resume."
    now = environment(device) | dict(facts or {})
    if is_present(run.config_file):
        remedy = "Give the earlier settings to resume it, or choose another --workdir for a new run."
        old = read(run.config_file)
        _require_equal(old, config, f"{run.path} holds a run with other settings", remedy, MAY_CHANGE)
        require_ahead(run, config)
        started = tomllib.loads(read_text(run.config_file)).get("environment", {})
        started = started if isinstance(started, dict) else {}
        restarts = started.get("restarts", [])
        other = {key: value for key, value in now.items() if started.get(key) != value}
        other |= {"changed": changed} if (changed := diff(old, config)) else {}
        now = {**started, "restarts": [*(restarts if isinstance(restarts, list) else []), other]}
    elif checkpoint_steps(run.checkpoints):
        _require_saved_with(run, config)
    else:
        run.require_new(first_save(config))
    with writing(run.config_file):
        atomic_write(run.config_file, to_toml(config, header) + "\n" + tomli_w.dumps({"environment": now}))


def first_save(config: Config) -> int:
    """The step of the first checkpoint of a run."""
    return min(config.train.save_every, config.train.eval_every, config.train.steps)


def _require_saved_with(run: RunFolder, config: Config) -> None:
    """Raise `UserError` unless the checkpoints of a run without a config.toml were saved with the settings `config`."""
    saved = read_meta(choose_intact(run.path, "latest"))["extra"].get(SETTINGS)
    if saved != settings_digest(config):
        what = "were saved with other settings" if saved else "do not state their settings"
        raise UserError(
            f"{run.config_file} is gone, and the checkpoints next to it {what}. Give the settings that the run was "
            "started with, restore the file, or choose another --workdir for a new run; nothing was overwritten."
        )


def open_run(path: str | Path, config: Config, device: str = "", facts: Mapping[str, Any] | None = None) -> RunFolder:
    """Make the run folder `path` with its config.toml, or reopen it if it holds a run with the same settings.

    `device` and `facts` are recorded there.

    Raises:
        UserError: the settings differ (except `MAY_CHANGE`), or another process is using the folder.
        RunError: it cannot be written.
    """
    run = RunFolder(path)
    if run.path.exists() and not run.path.is_dir():
        raise UserError(f"--workdir {run.path} is a file; give a folder")
    if folds := started_folds(run.path):
        raise UserError(
            f"{run.path} holds {len(folds)} folds: give --folds to go on with them, or another --workdir for this run"
        )
    with writing(run.path):
        run.path.mkdir(parents=True, exist_ok=True)
    with run.lock():
        record(run, config, device, facts)
    return run


def require_same_settings(group: Group, config: Config) -> None:
    """Raise `UserError` with the differences if this process has other settings than the main one."""
    text = group.broadcast(to_toml(config))
    what = f"process {group.index} has other settings than the main one"
    main, remedy = parse(text, "the main process's settings"), "Give all processes the same settings."
    _require_equal(main, config, what, remedy, OF_A_PROCESS)


def _require_equal(old: Config, new: Config, what: str, remedy: str, ignore: tuple[str, ...]) -> None:
    """Raise `UserError` with the settings that differ, except those to `ignore`."""
    if changed := diff(old, new, ignore=ignore):
        listing = "\n".join(f"  - {line}" for line in changed)
        raise UserError(f"{what}:\n{listing}\n{remedy}")
