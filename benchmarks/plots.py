"""python -m benchmarks.plots: draw the figures of docs/performance.md from benchmarks/results."""

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

RESULTS = Path(__file__).parent / "results"
PICTURES = Path(__file__).resolve().parents[1] / "docs" / "images"
COLOURS = {"jax": "#2a6fbb", "torch": "#d9822b"}


def runs(pattern: str) -> list[dict[str, Any]]:
    """Load the runs of all result files that match `pattern`."""
    found = []
    for path in sorted(RESULTS.glob(pattern)):
        found += json.loads(path.read_text(encoding="utf-8"))["runs"]
    return found


def bars(run: dict[str, Any]) -> plt.Figure:
    """Draw the training and inference time of each contender in one run."""
    rows = [row for row in run["results"] if "train_s" in row]
    figure, axes = plt.subplots(1, 2, figsize=(9, 0.4 * len(rows) + 1.2), layout="constrained", sharey=True)
    work = run["work"]
    for axis, key, title in zip(axes, ("train_s", "infer_s"), ("training step", "inference"), strict=True):
        values = [row[key] * 1e3 for row in rows]
        colours = [COLOURS[row["name"].split()[0]] for row in rows]
        drawn = axis.barh([row["name"] for row in rows], values, color=colours)
        axis.bar_label(drawn, fmt="{:.0f}", padding=3)
        axis.set(xlabel="ms", title=title, xlim=(0, 1.15 * max(values)))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.suptitle(f"{work['size']}x{work['size']}, batch {work['batch']}, {work['precision']}")
    return figure


def belongs(contender: str, line: str, key: str) -> bool:
    """Whether a contender counts for a line of `growth`; PyTorch with our allocator settings does not."""
    if not line.startswith("torch"):
        return contender == line
    # NCHW is the only variant that trains at 1024x1024 in reasonable time, and far from PyTorch's best in inference.
    best = key == "train_s" or "channels_last" in contender
    return contender.startswith("torch") and best and "retained" not in contender


def growth(found: list[dict[str, Any]]) -> plt.Figure:
    """Draw time per pixel over image size at batch 1, with PyTorch's fastest variant at each size."""
    single = sorted((run for run in found if run["work"]["batch"] == 1), key=lambda run: run["work"]["size"])
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, key, title in zip(axes, ("train_s", "infer_s"), ("training step", "inference"), strict=True):
        for name, style in (("jax auto", "o-"), ("jax remat", "o--"), ("torch, best variant", "s-")):
            points = []
            for run in single:
                size = run["work"]["size"]
                times = [row[key] for row in run["results"] if key in row and belongs(row["name"], name, key)]
                if times:
                    points.append((size, min(times) / size**2 * 1e6))
            if points and not (name == "jax remat" and key == "infer_s"):
                axis.plot(*zip(*points, strict=True), style, label=name, color=COLOURS[name.split()[0]])
        axis.set(xscale="log", xlabel="image size in pixels", ylabel="µs per pixel", title=title)
        axis.set_xticks(sizes := [run["work"]["size"] for run in single], [str(size) for size in sizes], minor=False)
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    """Draw all figures."""
    plt.rcParams |= {"svg.hashsalt": "pdrunet-jax", "svg.fonttype": "none", "font.family": "sans-serif"}
    found = runs("steps_cpu*.json")
    pictures = {"growth_cpu": growth(found)}
    for run in found:
        if run["work"]["size"] == 256:
            pictures[f"steps_cpu_batch{run['work']['batch']}"] = bars(run)
    for name, figure in pictures.items():
        figure.savefig(PICTURES / f"{name}.svg", metadata={"Date": None})
        print(PICTURES / f"{name}.svg")


if __name__ == "__main__":
    main()
