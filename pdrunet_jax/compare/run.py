"""A comparison from its options to its results."""

import dataclasses
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any

from pdrunet_jax.compare.options import CompareOptions
from pdrunet_jax.compare.plan import Plan, PlannedModel, equal_time, read_plan, require_same, write_plan
from pdrunet_jax.compare.speed import Speed, measure, read_speed, write_speed
from pdrunet_jax.compare.trainings import train_seed
from pdrunet_jax.data.dataset import Dataset, open_dataset
from pdrunet_jax.data.folds import of_all
from pdrunet_jax.evaluate.scores import aligned
from pdrunet_jax.model.build import with_network
from pdrunet_jax.model.execution import Execution
from pdrunet_jax.model.folds import started_folds
from pdrunet_jax.runtime import cli
from pdrunet_jax.runtime.devices import describe_device
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.files import writing
from pdrunet_jax.runtime.run_folder import RunFolder
from pdrunet_jax.runtime.stop import StopFlag
from pdrunet_jax.train.run import choose_outputs, require_validation


def run(options: CompareOptions, stop: StopFlag) -> int:
    """Check everything, measure, train what is not trained yet, and write the results. Returns the exit code."""
    folder = options.folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file; give a folder")
    if (folder / "config.toml").exists() or started_folds(folder):
        raise UserError(f"{folder} holds a training; choose another --output for a comparison")
    device = describe_device(options.settings.train.precision, options.settings.train.deterministic)
    print(device, flush=True)
    dataset = _open(options)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(RunFolder(folder).lock())
        except UserError as error:
            raise UserError(str(error).replace("--workdir", "--output")) from None
        prepared = _prepare(options, dataset, device, stop)
        if prepared is None:
            return cli.STOPPED
        plan, speeds = prepared
        print(_announcement(options, plan, speeds), flush=True)
        for seed in options.all_seeds:
            if code := train_seed(options, plan, seed, stop):
                return code
    return 0


def _open(options: CompareOptions) -> Dataset:
    """Open the dataset, and check that all networks can be trained and compared on it."""
    data = options.settings.data
    dataset = open_dataset(dataclasses.replace(data, fold=f"1/{options.folds}") if options.folds else data)
    for note in of_all(dataset.notes):
        print(cli.printable(note), flush=True)
    for network in options.models:
        config = with_network(options.settings, network)
        choose_outputs(config, dataset)
        Execution.of(config.model.conv)  # refuses a path that does not run here
    require_validation(dataset)
    if not dataset.of("test"):
        raise UserError(
            f"{dataset.root} has no test images to compare networks on: raise --data.test-fraction, or give --folds 5 "
            "to test on all images"
        )
    return dataset


def _prepare(
    options: CompareOptions, dataset: Dataset, device: str, stop: StopFlag
) -> tuple[Plan, Mapping[str, Speed]] | None:
    """The plan of the named networks and what was measured of them; None if asked to stop.

    A network that is new to the comparison is measured together with the others, and the plan in the folder is added
    to. Numbers of steps that it holds are kept.
    """
    folder, settings = options.folder, options.settings
    earlier = read_plan(folder)
    models = tuple(
        PlannedModel(network, settings.train.steps, with_network(settings, network).model) for network in options.models
    )
    plan = Plan(dataset.fingerprint(), options.budget, options.folds or 0, models, settings)
    if earlier:
        require_same(earlier, plan, folder)

    # Measure all networks together, unless that has been done.
    known = {each.network: each for each in earlier.models} if earlier else {}
    reference = earlier.models[0] if earlier else models[0]
    path = folder / "speed.json"
    speeds = read_speed(path)
    wanted = {each.network: each.model for each in (reference, *models)}
    if not earlier or not speeds.keys() >= wanted.keys():
        print(f"measuring {len(wanted)} networks in turns", flush=True)
        found = measure(
            {name: dataclasses.replace(settings, model=model) for name, model in wanted.items()}, dataset, stop
        )
        if found is None:
            return None
        speeds = {**(speeds if earlier else {}), **found}
        about: dict[str, Any] = {
            "device": device,
            "measured": datetime.now(UTC).isoformat(timespec="seconds"),
            "size": list(settings.data.height_width),
            "batch_size": settings.train.batch_size,
        }
        write_speed(path, speeds, about)

    # Numbers of steps, for networks that have none yet.
    if options.budget == "time":
        first = speeds[reference.network].step_seconds
        counts = {
            each.network: equal_time(reference.steps, first, speeds[each.network].step_seconds) for each in models
        }
        models = tuple(dataclasses.replace(each, steps=counts[each.network]) for each in models)
    models = tuple(known.get(each.network, each) for each in models)
    added = tuple(each for each in models if each.network not in known)
    if added:
        base = earlier or dataclasses.replace(plan, models=())
        write_plan(dataclasses.replace(base, models=(*base.models, *added)), folder)
    return dataclasses.replace(plan, models=models), speeds


def _announcement(options: CompareOptions, plan: Plan, speeds: Mapping[str, Speed]) -> str:
    """What will be trained, and about how long it takes, as a table and a line."""
    head = ["network", "parameters", "time a step", "steps", "training", "inference, an image"]
    table, total = [head], 0.0
    for each in plan.models:
        speed = speeds[each.network]
        seconds = speed.step_seconds * each.steps
        total += seconds
        table.append(
            [
                each.network,
                f"{speed.parameters:,}",
                f"{speed.step_seconds * 1e3:,.1f} ms",
                f"{each.steps:,}",
                duration(seconds),
                f"{speed.image_seconds * 1e3:,.1f} ms",
            ]
        )
    folds, seeds = plan.folds or 1, len(options.all_seeds)
    runs = f"{len(plan.models)} networks x {f'{folds} folds x ' if plan.folds else ''}{seeds} seeds"
    steps = duration(total * folds * seeds)
    return f"{aligned(table, words=1)}\n{runs}: about {steps} of training steps in all, validation and scoring apart"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, as it reads best."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
