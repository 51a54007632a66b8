"""Command `export`: write a trained model as a file that runs without this package, or for the Hugging Face Hub."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import tyro

import pdrunet_jax
from pdrunet_jax.export.check import Run, check_images, compare_outputs
from pdrunet_jax.export.hub import write_hub
from pdrunet_jax.export.onnx_graph import build_onnx, open_onnx, require
from pdrunet_jax.export.page import build_page, open_page, read_template
from pdrunet_jax.export.stablehlo import GraphSpec, build_stablehlo, open_stablehlo, pillow_resizes_tall_first
from pdrunet_jax.model.base import Network
from pdrunet_jax.model.load import build_loaded, find_run, load_weights
from pdrunet_jax.model.pixels import class_names
from pdrunet_jax.model.sides import SWAP
from pdrunet_jax.predict.inference import height_width
from pdrunet_jax.predict.threshold import Threshold, resolve_threshold, thresholds_text
from pdrunet_jax.runtime import cli
from pdrunet_jax.runtime.errors import RunError, UserError
from pdrunet_jax.runtime.files import atomic_write, require_replaceable, writing

FORMATS: dict[str, tuple[Callable[[Network, GraphSpec], bytes], Callable[[bytes], Run]]] = {
    "onnx": (build_onnx, open_onnx),
    "stablehlo": (build_stablehlo, open_stablehlo),
    "html": (build_page, open_page),
}
"""How a file of each format is built and opened."""


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """Export a trained model to ONNX, a StableHLO artifact for jax.export, a page for a browser, or a Hub folder.

    The file maps uint8 images to masks of the same size, unless --network-only; it includes resizing, scaling,
    probabilities and threshold. Before it is written, it is run and compared with the model. See docs/export.md.
    """

    weights: str
    """Run folder, checkpoint, .safetensors or public .pth, or a name of weights that come with the package."""
    format: Literal["onnx", "stablehlo", "html", "hub"]
    """onnx for onnxruntime, OpenVINO and other runtimes, stablehlo for JAX, html for one page that works offline in a
    browser, hub for a folder to upload to the Hugging Face Hub: weights, settings and model card."""
    output: Path
    """Output file; for hub, a new folder."""
    size: tuple[int, ...] = ()
    """Size in pixels to run the network at: height and width, or one number for both. Default: the training size."""
    dynamic: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Run the network at each image's own size, as predict --size own does. ONNX only."""
    network_only: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Leave scaling, resizing and the mask to the caller: float32 images in [0, 1] at the network's size, to
    probabilities and logits. ONNX and StableHLO only."""
    threshold: Threshold = 0.5
    """Foreground probability threshold, or validation for the one that scored best on the validation set during
    training. Models with one output or overlapping classes only; for
    these also one a class, as in bone=0.4,implant=0.6."""
    check_image: tuple[Path, ...] = ()
    """Images for the comparison. Default: synthetic X-rays."""
    license: str = "unknown"
    """License of the weights for the model card, as the Hub spells it: mit, cc-by-4.0, ... hub only."""
    force: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Replace the file OUTPUT if it exists; never a folder."""


def export(options: ExportOptions) -> list[str]:
    """Export a model, provided that the file gives the model's results; returns lines to print.

    Raises:
        UserError: The weights, an option or an image are invalid, the output exists, or a package is missing.
        RunError: The file does not agree with the model, or cannot be written. An existing output is left alone.
    """
    _check_options(options)
    if options.format == "hub":
        return write_hub(load_weights(options.weights), options.output, find_run(options.weights), options.license)
    if options.output.is_dir():
        raise UserError(f"{options.output} is a folder; give the name of a file")
    require_replaceable(options.output, Path(options.weights), options.force)
    for package in ("onnx", "onnxruntime") if options.format != "stablehlo" else ():
        require(package, options.format)  # before any work is done
    if options.format == "html":
        read_template()
    build, open_file = FORMATS[options.format]
    loaded = load_weights(options.weights)
    model = build_loaded(loaded, param_dtype=jnp.float32)
    if model.spacing is not None:
        raise UserError(
            f"{options.weights} works on images resampled to {model.spacing:g} mm per pixel (data.spacing), and an "
            "exported file is not told the spacing of an image: use predict, or train with data.spacing unset"
        )
    threshold = resolve_threshold(options.threshold, loaded.options, options.weights)
    size = None if options.dynamic else height_width(options.size) or model.size
    if size is None and not options.dynamic:
        raise UserError(f"{options.weights} does not state the size that it was trained at; give --size")
    images = check_images(options.check_image, model.config.in_channels)
    alone = options.network_only or options.format == "html"
    spec = GraphSpec(size, threshold, pillow_resizes_tall_first(), model.fit, network_only=alone)
    facts = _metadata(model, loaded.options.get("class_names"), spec)
    facts |= {SWAP: loaded.options[SWAP]} if loaded.options.get(SWAP) else {}
    data = build(model, dataclasses.replace(spec, metadata=facts))
    agreement = compare_outputs(open_file(data), model, images, spec)
    if not agreement.good:
        raise RunError(f"{options.output} was not written: its results do not agree with the model's. {agreement}")
    with writing(options.output):
        options.output.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(options.output, data)
    use = [f"  {facts['input']}", *(f"  -> {line}" for line in facts["outputs"])]
    if options.format == "html":
        use = ["  open it in a browser; it needs no connection and sends nothing"]
    at = f"{size[0]} x {size[1]} ({model.fit})" if size else "each image's own size"
    return [
        f"{options.output}: {options.format}, {len(data):,} bytes",
        *use,
        f"  works at {at}; classes: {', '.join(facts['class_names'])}",
        f"  agrees with the model on {agreement}",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; `arguments` default to those of the process."""
    print("\n".join(export(tyro.cli(ExportOptions, args=arguments, prog=cli.program("export")))))


def _check_options(options: ExportOptions) -> None:
    """Raise `UserError` for options that contradict each other or the format."""
    if options.dynamic and options.size:
        raise UserError("--dynamic runs the network at each image's own size; leave out --size or --dynamic")
    if options.dynamic and options.format != "onnx":
        raise UserError(f"--dynamic is for --format onnx, not {options.format}; leave it out")
    if options.network_only and options.format in ("html", "hub"):
        raise UserError(f"--network-only is for --format onnx and stablehlo, not {options.format}; leave it out")
    if options.license != "unknown" and options.format != "hub":
        raise UserError(f"--license is for --format hub, not {options.format}; leave it out")
    if options.format == "hub" and (options.size or options.check_image or options.threshold != 0.5):
        raise UserError("--format hub stores the weights as they are: leave out --size, --threshold and --check-image")


def _metadata(model: Network, labels: Sequence[str] | None, spec: GraphSpec) -> dict[str, Any]:
    """Self-description of the file, as JSON values; `labels` are the foreground classes, if known."""
    channels, single, overlap = model.config.in_channels, model.outputs == 1, model.multilabel
    names = class_names(model.foreground_classes, labels)
    decision = f"index into class_names; {f'above {spec.threshold}' if single else 'the most probable class'}"
    if overlap:
        decision = (
            f"1 where a class of class_names is, above {thresholds_text(spec.threshold, names)}; classes may overlap"
        )
    inner = ", ".join(map(str, spec.size or ("H", "W")))
    outer = inner if spec.network_only else "H, W"
    kind, grey = ("float32", "[0, 1]") if spec.network_only else ("uint8", "0 to 255")
    outputs = [
        f"mask: uint8 (N, {outer}{f', {model.outputs}' if overlap else ''}), {decision}",
        f"probability: float32 (N, {outer}) of foreground"
        if single
        else f"probability: float32 (N, {outer}, {model.outputs})",
        f"logits: float32 (N, {inner}, {model.outputs}), at the network's size",
    ]
    return {
        "version": pdrunet_jax.__version__,
        "class_names": names if overlap else ["background", *names],
        "multilabel": overlap,
        "size": list(spec.size) if spec.size else None,
        "fit": model.fit,
        "threshold": spec.threshold if single or overlap else None,
        "input": f"images: {kind} (N, {outer}, {channels}), {'grey' if channels == 1 else 'RGB'} values, {grey}",
        "outputs": outputs[int(spec.network_only) :],
    }


if __name__ == "__main__":
    cli.run(main)
