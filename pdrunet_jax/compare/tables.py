"""Tables of a comparison, as cells of text, from the values of compare.json."""

from collections.abc import Mapping
from typing import Any

from pdrunet_jax.evaluate.scores import aligned, format_score, label
from pdrunet_jax.runtime.cli import printable

Table = list[list[str]]

COST_NOTE = (
    "Measured in turns, so that whatever else the machine did affected all networks; medians. A step: without "
    "waiting for data. Inference: an image in a batch as in training, without reading it. Memory: what the compiler "
    "plans for a training step, with weights, optimizer and batch."
)


def score_table(values: Mapping[str, Any]) -> Table:
    """One row per class, metric and network; the first columns are words (`score_words`)."""
    several = len(values["classes"]) > 1
    head = ["metric", "network", "mean", "95% interval", *_seed_columns(values), "images"]
    table = [["class", *head] if several else head]
    for group in values["models"][0]["scores"]:
        for metric in values["models"][0]["scores"][group]:
            for model in values["models"]:
                each = model["scores"][group][metric]
                name = label(metric, values["unit"], values["tolerance"])
                cells = [name, model["network"], format_score(each["mean"]), _bounds(each)]
                cells += [*_seed_cells(each), str(each["images"])]
                table.append([group, *cells] if several else cells)
    return table


def score_words(values: Mapping[str, Any]) -> int:
    """Number of columns of words in `score_table`."""
    return 3 if len(values["classes"]) > 1 else 2


def difference_table(values: Mapping[str, Any]) -> Table:
    """Differences of every network from the first, one row per metric and network; two columns of words."""
    head = ["metric", "network", "difference", "95% interval", "p", "better", "worse", "equal"]
    table = [[*head, *_seed_columns(values)]]
    for each in from_first(values):
        counts = (str(each[count]) for count in ("better", "worse", "equal"))
        p = "n/a" if each["p"] is None else f"{each['p']:.2g}"
        name = label(each["metric"], values["unit"], values["tolerance"])
        cells = [name, each["network"], format_score(each["mean"], "+"), _bounds(each, "+"), p, *counts]
        table.append([*cells, *_seed_cells(each, "+")])
    return [table[0], *sorted(table[1:], key=lambda row: [line[0] for line in table].index(row[0]))]


def from_first(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The differences from the first network."""
    first = values["models"][0]["network"]
    return [each for each in values["differences"] if each["against"] == first]


def pair_table(values: Mapping[str, Any]) -> Table:
    """Dice of the network of each row minus the network of each column, with interval; one column of words."""
    names = [model["network"] for model in values["models"]]
    dice = {(each["network"], each["against"]): each for each in values["differences"] if each["metric"] == "dice"}

    def cell(row: str, column: str) -> str:
        if row == column:
            return ""
        if (row, column) in dice:
            each, sign = dice[row, column], 1
        else:
            each, sign = dice[column, row], -1
        if each["mean"] is None:
            return "n/a"
        low, high = sorted((sign * each["low"], sign * each["high"])) if each["low"] is not None else (None, None)
        return f"{format_score(sign * each['mean'], '+')} ({format_score(low, '+')} to {format_score(high, '+')})"

    return [["row minus column", *names], *([row, *(cell(row, column) for column in names)] for row in names)]


def cost_table(values: Mapping[str, Any]) -> Table:
    """Parameters, steps, time and memory of every network; one column of words."""
    table = [["network", "parameters", "steps", "time a step", "training", "inference, an image", "memory of a step"]]
    for model in values["models"]:
        memory = "n/a" if model["step_bytes"] is None else f"{model['step_bytes'] / 2**20:,.0f} MiB"
        table.append(
            [
                model["network"],
                f"{model['parameters']:,}",
                f"{model['steps']:,}",
                milliseconds(model["step_seconds"]),
                duration(model["training_seconds"]),
                milliseconds(model["image_seconds"]),
                memory,
            ]
        )
    return table


def caption(values: Mapping[str, Any]) -> str:
    """What was compared, in a sentence."""
    seeds, folds = values["seeds"], values["folds"]
    many = f"{len(seeds)} seeds ({', '.join(map(str, seeds))})" if len(seeds) > 1 else f"one seed ({seeds[0]})"
    where = f"out of fold, in {folds} folds" if folds else "test images"
    equal = "the same number of steps" if values["budget"] == "steps" else "the same time of training"
    return (
        f"{len(values['models'])} networks on {values['images']} images of {values['patients']} patients ({where}), "
        f"with {many}, {equal} and otherwise equal settings."
    )


def notes(values: Mapping[str, Any]) -> list[str]:
    """How to read scores and differences, a sentence or two each."""
    lines = [
        "Scores at each image's own resolution, mean over seeds. Interval of the mean: bootstrap over patients. It "
        "leaves out the seed: compare it with the scores of each seed and their standard deviation (sd)."
    ]
    if len(values["seeds"]) == 1:
        lines.append("With one seed, nobody knows how much of a difference is luck: give more --seeds.")
    overall = [model["scores"][values["overall"]]["hd95"]["images"] for model in values["models"]]
    if len(set(overall)) > 1:
        lines.append(
            "hd95 is undefined where a network finds nothing, so its means are over different images; its differences "
            "are over images where both networks have one."
        )
    return lines


def difference_note(values: Mapping[str, Any]) -> str:
    """How to read the differences."""
    first = values["models"][0]["network"]
    return (
        f"Each network minus {first}, on the same images. If the interval excludes 0 and the seeds agree, the networks "
        "differ on data like this. p: sign-flip test by patient, not corrected for the number of comparisons. Better, "
        "worse, equal: images."
    )


def text(values: Mapping[str, Any]) -> str:
    """The results as printed."""
    parts = [
        caption(values),
        aligned(score_table(values), score_words(values)),
        *notes(values),
        aligned(difference_table(values), 2),
        difference_note(values),
        aligned(cost_table(values), 1),
        COST_NOTE,
    ]
    return printable("\n".join(parts))


def lines(values: Mapping[str, Any]) -> list[str]:
    """The result of each network in a line: `unet: dice 0.934 (95% 0.921-0.945), +0.010 (95% 0.002-0.018) ...`."""
    found = {each["network"]: each for each in from_first(values) if each["metric"] == "dice"}
    first, result = values["models"][0]["network"], []
    for model in values["models"]:
        dice = model["scores"][values["overall"]]["dice"]
        line = f"{model['network']}: dice {format_score(dice['mean'])} (95% {_bounds(dice)})"
        if each := found.get(model["network"]):
            line += f", {format_score(each['mean'], '+')} (95% {_bounds(each, '+')}) against {first}"
        if len(dice["by_seed"]) > 1:
            line += f", sd over seeds {format_score(dice['seed_sd'])}"
        result.append(printable(line))
    return result


def milliseconds(seconds: float) -> str:
    """Milliseconds with three digits or more."""
    value = seconds * 1e3
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, as it reads best."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def _bounds(each: Mapping[str, Any], sign: str = "") -> str:
    return f"{format_score(each['low'], sign)} to {format_score(each['high'], sign)}"


def _seed_columns(values: Mapping[str, Any]) -> list[str]:
    return ["each seed", "sd over seeds"] if len(values["seeds"]) > 1 else []


def _seed_cells(each: Mapping[str, Any], sign: str = "") -> list[str]:
    if len(each["by_seed"]) == 1:
        return []
    return ["  ".join(format_score(value, sign) for value in each["by_seed"]), format_score(each["seed_sd"])]
