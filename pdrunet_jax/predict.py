"""python -m pdrunet_jax.predict: masks, overlays and probabilities for files, folders and globs.

In Python, `pdrunet_jax.predict` is the function of that name in `pdrunet_jax.inference`. Importing this module puts
the module in its place (that is how Python treats a package and its modules), so the module can be called like it.
"""

import glob
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import numpy as np
import tyro
from PIL import Image

from pdrunet_jax import cli, pictures
from pdrunet_jax.data.images import SUFFIXES, read_image
from pdrunet_jax.errors import DataError, RunError, UserError
from pdrunet_jax.inference import Prediction, check_threshold, predict
from pdrunet_jax.loading import load_model, load_options
from pdrunet_jax.model import PDRUNet

SKIPPED = ("._", ".DS_Store", "__MACOSX")
"""Beginnings of the names of what macOS leaves behind: no images, whatever their extension."""

RESULT = re.compile(r"_(mask|overlay|probability(_[^.]*)?)\.png$")
"""Ends of the names that this command writes."""


@dataclass(frozen=True)
class Options:
    """Segment images: NAME_mask.png and NAME_overlay.png for each, at its own resolution.

    NAME_mask.png is an index image: NumPy reads class indices from it, a viewer shows colours (one class: white on
    black, 255 when read as grey). The folder structure below the inputs' common folder is kept. An image that cannot
    be read does not stop the rest; it is named at the end, and the exit code is 1.
    """

    inputs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="INPUT...")]
    """Image files, folders (searched recursively) and glob patterns."""
    weights: str
    """Run folder, checkpoint, .safetensors or public .pth."""
    output: Path
    """Folder for the results; is made."""
    size: tuple[int, ...] = ()
    """Height and width in pixels that the network works at, one number for both; as it was trained when left out, and
    the image's own where the weights do not tell."""
    threshold: float = 0.5
    """Probability above which a pixel is foreground; for one output only."""
    overlay: bool = True
    """Write NAME_overlay.png: the image with its mask tinted and outlined."""
    probability: bool = False
    """Write NAME_probability.png: 16 bits, 65535 is 1; for several classes NAME_probability_CLASS.png each."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = tyro.cli(Options, args=arguments, prog="python -m pdrunet_jax.predict")
    found = find_images(options.inputs, options.output)
    model, known = load_model(options.weights), load_options(options.weights)
    check_threshold(options.threshold, model.outputs)
    size = options.size or known.get("size")
    if size and (len(size) > 2 or min(size) < 1):
        raise UserError(f"--size {' '.join(map(str, size))}: give one number or height and width, 1 or more")
    network_size = (size[0], size[-1]) if size else None
    names = class_names(model, known.get("class_names"))

    failed: list[str] = []
    for number, (path, name) in enumerate(name_results(found).items(), 1):
        try:
            result = predict(model, path, size=network_size, threshold=options.threshold)
        except UserError as error:
            failed += error.problems if isinstance(error, DataError) else [f"{path}: {error}"]
            continue
        write_result(result, path, options.output / name, names, options)
        shares = ", ".join(f"{label} {np.mean(result.mask == index):.1%}" for index, label in enumerate(names, 1))
        print(f"{number}/{len(found)} {path}: {shares}", flush=True)
    print(f"{len(found) - len(failed)} of {len(found)} images segmented; results in {options.output}")
    if failed:
        listing = "\n".join(f"  - {problem}" for problem in failed)
        raise RunError(f"{len(failed)} of {len(found)} images could not be read:\n{listing}")


def find_images(inputs: Iterable[str], output: Path) -> list[Path]:
    """The images that `inputs` name, each once, in order.

    A file is taken whatever its name; in a folder, images are told by their extension, and results of an earlier run
    below `output` are left out. Raises `UserError` that lists every input without an image.
    """
    found: dict[Path, Path] = {}
    empty = []
    for text in inputs:
        path = Path(text)
        places = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(text, recursive=True))]
        images = [image for place in places for image in _images_in(place, output.resolve())]
        if not images:
            empty.append(f"{text}: {'holds no image' if places else 'there is no such file or folder'}")
        for image in images:
            found.setdefault(image.resolve(), image)
    if empty or not found:
        listing = "\n".join(f"  - {problem}" for problem in empty or ["no input was given"])
        raise UserError(f"nothing to segment; images end in {', '.join(sorted(SUFFIXES))}:\n{listing}")
    return list(found.values())


def name_results(paths: Sequence[Path]) -> dict[Path, Path]:
    """For each image the path of its results below the output folder, without suffix; no two are the same.

    It is the path below the images' common folder. Images of one folder that differ only in extension keep it:
    `a.png` and `a.dcm` become `a_png` and `a_dcm`.
    """
    common = Path(os.path.commonpath([path.absolute().parent for path in paths]))
    stems = {path: path.absolute().relative_to(common).with_suffix("") for path in paths}
    # Compared without case: some file systems take A_mask.png and a_mask.png for the same file.
    uses = Counter(str(stem).lower() for stem in stems.values())
    names = {
        path: stem.with_name(path.name.replace(".", "_")) if uses[str(stem).lower()] > 1 else stem
        for path, stem in stems.items()
    }
    taken: set[str] = set()
    for path, name in names.items():
        number = 2
        while str(names[path]).lower() in taken:
            names[path] = name.with_name(f"{name.name}_{number}")
            number += 1
        taken.add(str(names[path]).lower())
    return names


def write_result(result: Prediction, path: Path, target: Path, names: Sequence[str], options: Options) -> None:
    """Write what `options` ask for as `target`_mask.png and so on. Raises `RunError` if the folder refuses."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        pictures.save(pictures.index_mask(result.mask, len(names)), _named(target, "mask"))
        if options.overlay:
            drawn = pictures.overlay(read_image(path, 1), result.mask)
            pictures.save(Image.fromarray(drawn), _named(target, "overlay"))
        if options.probability:
            single = result.probability.ndim == 2
            for index, label in enumerate(names, 1):
                share = result.probability if single else result.probability[..., index]
                kind = "probability" if single else f"probability_{_safe(label)}"
                pictures.save(Image.fromarray(np.rint(share * 65535).astype(np.uint16)), _named(target, kind))
    except OSError as error:
        raise RunError(f"{error.filename or target}: cannot be written ({error.strerror})") from None


def class_names(model: PDRUNet, names: Sequence[str] | None) -> list[str]:
    """Names of the foreground classes; numbered where the weights do not tell."""
    count = max(model.outputs - 1, 1)
    if names and len(names) == count:
        return list(names)
    return ["foreground"] if count == 1 else [f"class_{index}" for index in range(1, count + 1)]


def _images_in(place: Path, output: Path) -> list[Path]:
    if place.is_file():
        return [place]
    return [
        path
        for path in sorted(place.rglob("*"))
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(SKIPPED) for part in path.relative_to(place).parts)
        and not (RESULT.search(path.name) and path.resolve().is_relative_to(output))
    ]


def _named(target: Path, kind: str) -> Path:
    return target.with_name(f"{target.name}_{kind}.png")


def _safe(label: str) -> str:
    return "".join(character if character.isalnum() or character in "-_" else "_" for character in label)


class _Callable(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Prediction:
        return predict(*arguments, **options)


if __name__ == "__main__":
    cli.run(main)
else:
    sys.modules[__name__].__class__ = _Callable
