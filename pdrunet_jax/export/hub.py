"""Export in the format of the Hugging Face Hub: a folder with weights, their settings, and a model card with scores."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import pdrunet_jax
from pdrunet_jax.model.files import write_safetensors
from pdrunet_jax.model.hub import CONFIG, LIBRARY, WEIGHTS, config_text
from pdrunet_jax.model.load import Loaded, load_weights
from pdrunet_jax.model.weights import to_public
from pdrunet_jax.runtime.digest import CONTENT, content_digest
from pdrunet_jax.runtime.errors import RunError, UserError
from pdrunet_jax.runtime.files import new_folder
from pdrunet_jax.runtime.opening import read_text
from pdrunet_jax.runtime.run_folder import RunFolder

CARD = "README.md"
SCORES = {"dice": "Dice", "iou": "IoU", "hd95": "HD95", "assd": "ASSD"}
"""Scores of summary.json in the card, with their titles."""


def write_hub(loaded: Loaded, output: Path, run: RunFolder | None, license_name: str) -> list[str]:
    """Write the folder `output` for the Hub; returns lines to print.

    `run` is the weights' run folder, whose scores enter the card. The weights are read back and compared.

    Raises:
        UserError: `output` exists and is not empty, or cannot be written; or the run's scores are damaged.
        RunError: What was written does not read back as it was.
    """
    arrays, options = to_public(loaded.params, loaded.stats, dead_block=False), loaded.options
    summary = _read_summary(run)
    with new_folder(output, "the model") as folder:
        digest = {CONTENT: content_digest(arrays, options)}
        write_safetensors(folder / WEIGHTS, arrays, {**options, **digest})
        (folder / CONFIG).write_text(config_text(options, pdrunet_jax.__version__), encoding="utf-8")
        (folder / CARD).write_text(card(output.name, options, summary, license_name), encoding="utf-8")
        again = load_weights(folder)
        back = to_public(again.params, again.stats, dead_block=False)
        if not (arrays.keys() == back.keys() and all(np.array_equal(back[name], arrays[name]) for name in arrays)):
            raise RunError(f"{output} was not written: the weights do not read back as they were")
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    return [
        *(f"{output / name}: {size:,} bytes" for name, size in sizes.items()),
        f"  license: {license_name}" + ("; state it with --license" if license_name == "unknown" else ""),
        f"  scores in {CARD}: " + (summary["line"] if summary else "none, for the weights belong to no evaluated run"),
        f'  pdrunet_jax.load_model("{output}"), and after an upload load_model("hf://OWNER/NAME")',
    ]


def card(name: str, options: Mapping[str, Any], summary: Mapping[str, Any] | None, license_name: str) -> str:
    """The model card, Markdown: front matter that the Hub reads, use, facts of the model, and scores if known."""
    names = options.get("class_names") or []
    size = options.get("size")
    lines = [
        "---",
        f"license: {json.dumps(license_name)}",
        f"library_name: {LIBRARY}",
        "pipeline_tag: image-segmentation",
        "tags:",
        *(f"- {tag}" for tag in (options["name"], "x-ray", "radiograph", "medical", "jax")),
        *_model_index(name, summary),
        "---",
        "",
        f"# {name}",
        "",
        f"Segments {', '.join(names) or 'foreground'} in X-ray images. A `{options['name']}` network of {LIBRARY}.",
        "Not a medical device.",
        "",
        "```python",
        "import pdrunet_jax",
        "",
        'model = pdrunet_jax.load_model("hf://OWNER/NAME")',
        'result = pdrunet_jax.segment(model, "xray.png")  # .mask, .probability, .spacing',
        "```",
        "",
        "| | |",
        "|---|---|",
        f"| classes | {', '.join(['background', *names]) if not options.get('multilabel') else ', '.join(names)} |",
        f"| trained at | {' x '.join(map(str, size)) + ' pixels' if size else 'unknown'} |",
        f"| images are | {'padded' if options.get('fit') == 'pad' else 'stretched'} to that size |",
    ]
    known = {"filters": "filters", "spacing": "mm per pixel", "threshold": "threshold chosen in validation"}
    lines += [f"| {title} | {options[key]} |" for key, title in known.items() if options.get(key) is not None]
    if summary:
        lines += ["", "## Scores", "", f"On {summary['images']} {summary['split']} images; mean and 95% interval.", ""]
        lines += ["| class | " + " | ".join(SCORES.values()) + " |", "|---" * (len(SCORES) + 1) + "|"]
        for label, scores in summary["classes"].items():
            cells = [_interval(scores[key]) if key in scores else "" for key in SCORES]
            lines.append(f"| {label} | {' | '.join(cells)} |")
        lines += ["", f"Distances are in {summary['unit']}."]
    return "\n".join(lines) + "\n"


def _model_index(name: str, summary: Mapping[str, Any] | None) -> list[str]:
    """Lines of the front matter with the mean Dice of each class, as the Hub shows them."""
    if not summary:
        return []
    metrics = [
        {"type": "dice", "name": f"Dice, {label}", "value": round(scores["dice"]["mean"], 4)}
        for label, scores in summary["classes"].items()
        if np.isfinite(scores["dice"]["mean"] or np.nan)
    ]
    result = {
        "task": {"type": "image-segmentation"},
        "dataset": {"type": "own", "name": f"own data, {summary['split']} images"},
        "metrics": metrics,
    }
    return ["model-index:", f"- name: {json.dumps(name, ensure_ascii=False)}", f"  results: {json.dumps([result])}"]


def _interval(score: Mapping[str, float | None]) -> str:
    mean, low, high = (score.get(key) for key in ("mean", "low", "high"))
    if mean is None:
        return ""
    return f"{mean:.3f}" + (f" ({low:.3f} to {high:.3f})" if low is not None and high is not None else "")


def _read_summary(run: RunFolder | None) -> dict[str, Any] | None:
    """The run's scores on test or, without them, validation images; None without either.

    Raises `UserError` if they are damaged.
    """
    files = [run.evaluation / split / "summary.json" for split in ("test", "val")] if run else []
    file = next((file for file in files if file.exists()), None)
    if file is None:
        return None
    try:
        summary: dict[str, Any] = json.loads(read_text(file))
        return {key: summary[key] for key in ("line", "images", "split", "unit", "classes")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}): run evaluate again, or remove it") from None
