"""The two kinds of masks that MURA's images come with: drawn in LabelMe, or images of their own coding."""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from pdrunet_jax.data.coding import UndeclaredError, declare, resolve
from pdrunet_jax.data.images import read_bytes
from pdrunet_jax.data.importing import LabelTable, check_classes, label_table
from pdrunet_jax.data.labelme import Boxes, Survey
from pdrunet_jax.data.labelme_shapes import Annotation, rasterise, read_annotation
from pdrunet_jax.data.masks import IGNORE, classify, decode_codes
from pdrunet_jax.errors import DataError, UserError


def annotated_path(path: Path, name: str) -> str | None:
    """`imagePath` of a LabelMe file without the extension, as words: it is never opened. None for other JSON.

    Raises `DataError`.
    """
    annotation = read_annotation(path, name)
    if annotation is None:
        return None
    return str(PurePosixPath(annotation.image_path.replace("\\", "/")).with_suffix(""))


class DrawnMasks:
    """LabelMe files: `add` every one, `settle`, then `read`."""

    def __init__(self, classes: Mapping[str, int | str], boxes: Boxes) -> None:
        numbers = {label: value for label, value in classes.items() if isinstance(value, int)}
        if len(numbers) < len(classes):
            raise UserError("--classes: LabelMe labels become numbers, such as --classes humerus 1 ulna 2")
        check_classes(numbers)
        self._declared, self._boxes = numbers, boxes
        self._table = LabelTable({}, {})
        self._survey = Survey()

    def add(self, path: Path, size: tuple[int, int], name: str) -> None:
        """Check the mask of an image of `size` (height, width). Raises `DataError`."""
        shapes = self._survey.add(_read(path, size, name), self._boxes).shapes
        rasterise(shapes, dict.fromkeys((shape.label for shape in shapes), 1), size, name)

    def settle(self) -> list[str]:
        """Decide what the labels become; returns what is wrong."""
        self._table = label_table(self._survey.labels, self._declared)
        return list(self._table.problems)

    def read(self, path: Path, size: tuple[int, int], name: str) -> NDArray[np.uint8]:
        """(H, W) class indices, or rather mask values. Raises `DataError`."""
        annotation = Survey().add(_read(path, size, name), self._boxes)
        return rasterise(annotation.shapes, self._table.index_of, size, name)

    @property
    def classes(self) -> dict[str, int]:
        """Class names with their values in what `read` returns."""
        return self._table.classes

    @property
    def ignores(self) -> bool:
        """Whether `read` may return `IGNORE`."""
        return any(self._table.index_of.get(label) == IGNORE for label in self._survey.labels)

    @property
    def notes(self) -> list[str]:
        """What the user should know."""
        return [*self._table.notes, *self._survey.notes()]


class ImageMasks:
    """Mask images in any coding that a dataset may have: `add` every one, `settle`, then `read`."""

    def __init__(
        self, classes: Mapping[str, int | str], ignore: int | str | None, threshold: int | None = None
    ) -> None:
        if threshold is not None and not 0 < threshold < 256:
            raise UserError(f"--threshold {threshold} is no grey value from 1 to 255")
        self._coding = declare(classes, ignore, threshold, source="--classes")
        self._found: list[tuple[str, dict[int, int]]] = []
        self.notes: list[str] = []

    def add(self, path: Path, size: tuple[int, int], name: str) -> None:
        """Check the mask of an image of `size` (height, width). Raises `DataError`."""
        codes = decode_codes(read_bytes(path, name), name, self._coding)
        if codes.shape != size:
            is_size = f"{codes.shape[1]}x{codes.shape[0]} pixels"
            raise DataError("mask", [f"{name}: {is_size}, but the image has {size[1]}x{size[0]}"])
        values, counts = np.unique(codes, return_counts=True)
        self._found.append((name, {int(value): int(count) for value, count in zip(values, counts, strict=True)}))

    def settle(self) -> list[str]:
        """Decide what the masks' values mean; returns what is wrong."""
        try:
            self._coding, self.notes = resolve(self._coding, self._found)
        except UndeclaredError as error:
            return error.problems
        return []

    def read(self, path: Path, size: tuple[int, int], name: str) -> NDArray[np.uint8]:
        """(H, W) class indices. Raises `DataError`."""
        return classify(decode_codes(read_bytes(path, name), name, self._coding), self._coding, name)

    @property
    def classes(self) -> dict[str, int]:
        """Class names with their values in what `read` returns."""
        return {name: index for index, name in enumerate(self._coding.names, start=1)}

    @property
    def ignores(self) -> bool:
        """Whether `read` may return `IGNORE`."""
        return bool(self._coding.ignore)


def _read(path: Path, size: tuple[int, int], name: str) -> Annotation:
    annotation = read_annotation(path, name)
    if annotation is None:
        raise DataError("unreadable annotation", [f"{name}: JSON, but no LabelMe file"])
    annotation.check_size(*size, "the image")
    return annotation
