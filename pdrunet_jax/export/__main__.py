"""python -m pdrunet_jax.export: the trained model as one file that runs without this package."""

import dataclasses
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import tyro

from pdrunet_jax.export.check import Run, check_images, compare
from pdrunet_jax.export.onnx_graph import build_onnx, open_onnx, require
from pdrunet_jax.export.stablehlo import build_stablehlo, open_stablehlo, tall_images_vertically_first
from pdrunet_jax.model.load import class_names, load_model, load_options
from pdrunet_jax.model.network import PDRUNet
from pdrunet_jax.predict.inference import height_width
from pdrunet_jax.predict.threshold import Threshold, resolve_threshold
from pdrunet_jax.runtime import cli
from pdrunet_jax.runtime.errors import RunError, UserError
from pdrunet_jax.runtime.files import atomic_write, writing

Format = Literal["onnx", "stablehlo"]


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """Write the model as ONNX, or as a StableHLO artifact of jax.export, from uint8 images to masks.

    Resizing to the network's size and back, scaling, probabilities and decision are inside. Before it is written, the
    file is run and compared with the model; docs/export.md shows how to use it.
    """

    weights: str
    """Run folder, checkpoint, .safetensors or public .pth."""
    format: Format
    """onnx for onnxruntime and others, stablehlo for JAX."""
    output: Path
    """The file to write."""
    size: tuple[int, ...] = ()
    """Height and width in pixels that the network works at, one number for both; as it was trained when left out."""
    threshold: Threshold = 0.5
    """Probability above which a pixel is foreground, or validation: the one that scored best on the validation images
    of the training. For one output only."""
    check_image: tuple[Path, ...] = ()
    """Images to compare on; synthetic X-rays when left out."""
    force: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Replace OUTPUT if it exists."""


def export(
    weights: str | Path,
    output: str | Path,
    *,
    format: Format,
    size: tuple[int, int] | None = None,
    threshold: Threshold = 0.5,
    check: Sequence[Path] = (),
    force: bool = False,
) -> list[str]:
    """Write the model in `weights` to `output`, if it runs there as it does here; returns what a user should know.

    Args:
        weights: as in `load_model`.
        output: the file.
        format: "onnx" or "stablehlo".
        size: (height, width) that the network works at, if not the one it was trained at.
        threshold: probability above which a pixel is foreground, for one output; "validation" for the one that the
            weights hold.
        check: images to compare on; synthetic X-rays where there are none.
        force: replace `output` if it exists.

    Raises:
        UserError: the weights, an option or an image cannot be used, `output` exists, or a package is missing.
        RunError: the file does not agree with the model, or cannot be written; `output` is as it was.
    """
    output = Path(output)
    _check_target(Path(weights), output, force)
    build, open_file = _tools(format)
    model, known = load_model(weights, param_dtype=jnp.float32), load_options(weights)
    threshold = resolve_threshold(threshold, known, weights)
    network_size = size or model.size
    if network_size is None:
        raise UserError(f"{weights} does not state the size that it was trained at; give --size")
    images = check_images(check, model.in_channels)
    facts = export_metadata(model, known.get("class_names"), network_size, threshold)
    data = build(
        model, size=network_size, threshold=threshold, tall_first=tall_images_vertically_first(), metadata=facts
    )
    agreement = compare(open_file(data), model, images, size=network_size, threshold=threshold)
    if not agreement.good:
        raise RunError(f"{output} is not written: it does not agree with the model. {agreement}")
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(output, data)
    return [
        f"{output}: {format}, {len(data):,} bytes",
        f"  {facts['input']}",
        *(f"  -> {line}" for line in facts["outputs"]),
        f"  works at {network_size[0]} x {network_size[1]}; classes: {', '.join(facts['class_names'])}",
        f"  agrees with the model on {agreement}",
    ]


def export_metadata(
    model: PDRUNet, names: Sequence[str] | None, size: tuple[int, int], threshold: float
) -> dict[str, Any]:
    """What the file says about itself, as JSON values; `names` are those of the foreground classes where known."""
    height, width = size
    classes = "" if model.outputs == 1 else f", {model.outputs}"
    decision = f"above {threshold}" if model.outputs == 1 else "the likeliest wins"
    return {
        "version": _version(),
        "class_names": ["background", *class_names(model, names)],
        "size": [height, width],
        "threshold": threshold if model.outputs == 1 else None,
        "input": f"images: uint8 (N, H, W, {model.in_channels}), {'grey' if model.in_channels == 1 else 'RGB'} values",
        "outputs": [
            f"mask: uint8 (N, H, W), index into class_names; {decision}",
            f"probability: float32 (N, H, W{classes})" + (" of foreground" if model.outputs == 1 else ""),
            f"logits: float32 (N, {height}, {width}, {model.outputs}), at the network's size",
        ],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; `arguments` default to the process's own."""
    options = tyro.cli(ExportOptions, args=arguments, prog="python -m pdrunet_jax.export")
    lines = export(
        options.weights,
        options.output,
        format=options.format,
        size=height_width(options.size) if options.size else None,
        threshold=options.threshold,
        check=options.check_image,
        force=options.force,
    )
    print("\n".join(lines))


def _tools(format: Format) -> tuple[Callable[..., bytes], Callable[[bytes], Run]]:
    """What makes a file, and what opens it; a missing package is found now, not after the work."""
    if format == "onnx":
        require("onnx")
        require("onnxruntime")
        return build_onnx, open_onnx
    return build_stablehlo, open_stablehlo


def _check_target(weights: Path, output: Path, force: bool) -> None:
    if output.is_dir():
        raise UserError(f"{output} is a folder; give the name of a file")
    if not output.exists():
        return
    if weights.exists() and weights.resolve() == output.resolve():
        raise UserError(f"{output} is --weights itself; give another --output")
    if not force:
        raise UserError(f"{output} exists; give --force to replace it")


def _version() -> str:
    try:
        return metadata.version("pdrunet-jax")
    except metadata.PackageNotFoundError:  # run from its folder, not installed
        return "unknown"


if __name__ == "__main__":
    cli.run(main)
