"""A comparison from its options to its results."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any

from pdrunet_jax.compare import tables
from pdrunet_jax.compare.cases import choose, write_cases
from pdrunet_jax.compare.options import CompareOptions
from pdrunet_jax.compare.page import write_page
from pdrunet_jax.compare.plan import Plan, PlannedModel, equal_time, read_plan, require_same, write_plan
from pdrunet_jax.compare.results import compute, learning_curves, mean_by_image, read_rows, to_csv
from pdrunet_jax.compare.speed import Speed, measure, read_speed, write_speed
from pdrunet_jax.compare.tables import duration, milliseconds
from pdrunet_jax.compare.trainings import scores_of, train_seed, training_folder
from pdrunet_jax.config import ModelConfig, to_dict
from pdrunet_jax.data.dataset import Dataset, open_dataset
from pdrunet_jax.data.folds import of_all
from pdrunet_jax.evaluate.report.html import Cell
from pdrunet_jax.evaluate.scores import aligned, without_nan
from pdrunet_jax.model.build import with_network
from pdrunet_jax.model.execution import Execution
from pdrunet_jax.model.folds import started_folds
from pdrunet_jax.runtime import cli
from pdrunet_jax.runtime.devices import describe_device
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.files import atomic_write, writing
from pdrunet_jax.runtime.opening import read_text
from pdrunet_jax.runtime.run_folder import RunFolder, environment
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
        prepared = prepare(options, dataset, device, stop)
        if prepared is None:
            return cli.STOPPED
        plan, speeds = prepared
        print(_announcement(options, plan, speeds), flush=True)
        for number, seed in enumerate(options.all_seeds, 1):
            if code := train_seed(options, plan, seed, stop):
                return code
            values = _write_results(options, plan, speeds, dataset, options.all_seeds[:number])
            if number < options.seeds:
                print(f"results so far: {folder / 'compare.html'}", flush=True)
    print(tables.text(values))
    print(f"results: {folder}, page: {folder / 'compare.html'}")
    print("\n".join(tables.lines(values)), flush=True)
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


def prepare(
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
    common = dataclasses.replace(settings, model=ModelConfig())
    plan = Plan(dataset.fingerprint(), options.budget, options.folds or 0, models, common)
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
        times = milliseconds(speed.step_seconds), f"{each.steps:,}", duration(seconds)
        table.append([each.network, f"{speed.parameters:,}", *times, milliseconds(speed.image_seconds)])
    folds, seeds = plan.folds or 1, len(options.all_seeds)
    parts = [f"{len(plan.models)} networks", *([f"{folds} folds"] if plan.folds else [])]
    parts.append(f"{seeds} seeds" if seeds > 1 else "1 seed")
    steps = duration(total * folds * seeds)
    return f"{aligned(table, words=1)}\n{', '.join(parts)}: about {steps} of training steps in all"


def _write_results(
    options: CompareOptions, plan: Plan, speeds: Mapping[str, Speed], dataset: Dataset, seeds: Sequence[int]
) -> dict[str, Any]:
    """Write compare.json, compare.csv, cases/ and compare.html from the trainings with `seeds`; returns the values."""
    folder, settings = options.folder, options.settings
    rows = read_rows(folder, plan, seeds)
    scored = json.loads(read_text(scores_of(training_folder(folder, plan.models[0], seeds[0]), plan) / "summary.json"))
    about = {
        **{key: scored[key] for key in ("split", "unit", "tolerance", "empty_dice")},
        "dataset": dataset.name,
        "data": settings.data.root,
        "budget": plan.budget,
        "folds": plan.folds,
        "seeds": list(seeds),
        **json.loads(read_text(folder / "speed.json")),
        "environment": environment(),
    }
    del about["networks"]
    values = compute(rows, plan, speeds, about)
    dice = {network: mean_by_image(of_seed) for network, of_seed in rows.items()}
    cases = write_cases(choose(dice), folder, plan, dataset, settings.data, seeds[0])
    first = {network: mean_by_image({seeds[0]: of_seed[seeds[0]]}) for network, of_seed in rows.items()}
    for case in cases:
        case["dice"] = without_nan({network: of_image[case["image"]] for network, of_image in first.items()})
    values["cases"] = cases
    with writing(folder):
        atomic_write(folder / "compare.csv", to_csv(rows))
        atomic_write(folder / "compare.json", json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    patients = {row.image: row.patient for row in rows[plan.models[0].network][seeds[0]]}
    images: list[list[Cell]] = [
        [image, patient, *(of[image] for of in dice.values())] for image, patient in patients.items()
    ]
    common = {key: value for key, value in to_dict(settings).items() if key not in ("seed", "model", "tracking")}
    write_page(folder, values, learning_curves(folder, plan, seeds), images, common)
    return values
