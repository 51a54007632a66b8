"""What an output folder says about its own results: each mask carries how it was made, and `areas.csv` the areas.

The mask is the last picture that is written of an image, so that with it everything else is there, however the process
ended. Nothing is shared between images: any number of machines may write to one folder.
"""

import csv
import fcntl
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from pdrunet_jax.errors import UserError
from pdrunet_jax.files import atomic_write, writing
from pdrunet_jax.integrity import sha256

KEY = "pdrunet_jax.predict"
"""Key of the PNG text in a mask that holds its record, one JSON object."""

Record = dict[str, Any]
"""How a mask was made: "settings", "input" (see `stamp`), "files" written beside it, "pixels" of each class by name,
"spacing" in mm or null."""


def stamp(path: Path) -> dict[str, Any]:
    """What tells an image from a changed one: its digest, and size and time of change, which are quick to compare."""
    state = path.stat()
    return {"bytes": state.st_size, "changed": state.st_mtime_ns, "sha256": sha256(path)}


def unchanged(path: Path, known: Mapping[str, Any]) -> bool:
    """Whether the image at `path` is still the one of which `known` is the stamp."""
    state = path.stat()
    if state.st_size != known["bytes"]:
        return False
    return state.st_mtime_ns == known["changed"] or sha256(path) == known["sha256"]


def save_mask(image: Image.Image, path: Path, record: Record) -> None:
    """Write a mask with its record, all of it or nothing. Raises `OSError` if the disk refuses."""
    text = PngImagePlugin.PngInfo()
    text.add_text(KEY, json.dumps(record))
    file = io.BytesIO()
    image.save(file, format="PNG", pnginfo=text)
    atomic_write(path, file.getvalue())


def read_record(path: Path) -> Record | None:
    """The record in a mask; None for a picture that this command has not written. Raises `OSError` if there is none."""
    try:
        with Image.open(path, formats=("PNG",)) as image:  # reads no pixels
            record = json.loads(image.info.get(KEY, "null"))
    except (UnidentifiedImageError, ValueError, SyntaxError):
        return None
    return record if isinstance(record, dict) and {"settings", "input", "files", "pixels"} <= record.keys() else None


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two settings, a few words each."""
    return [
        f"other {name}" if name == "weights" else f"{name} was {then.get(name)}, is {now.get(name)}"
        for name in now
        if then.get(name) != now[name]
    ]


class Areas:
    """`areas.csv`: a row for each image and class, with the area where the file states its pixels' spacing.

    It is made anew from the masks' records at the start, so that nothing in it is lost or there twice, and grows by
    the rows of an image at a time.
    """

    COLUMNS = ("image", "class", "pixels", "area_mm2")

    def __init__(self, path: Path, finished: Iterable[tuple[str, Record]]) -> None:
        """Open `path` with the rows of what is `finished`: names and records.

        Raises `UserError` if another process has it open, `RunError` if the disk refuses.
        """
        self._path = path
        text = "".join([_lines([self.COLUMNS]), *(_lines(_rows(name, record)) for name, record in finished)]).encode()
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
            self._lock()
            if self._file.read() != text:
                # Over what is there: mostly the same bytes, so that a kill in between leaves the rows as they were.
                self._file.seek(0)
                self._write(text)
                self._file.truncate()

    def add(self, name: str, record: Record) -> None:
        """Append the rows of an image. Raises `RunError` if the disk refuses."""
        with writing(self._path):
            self._write(_lines(_rows(name, record)).encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UserError(
                f"{self._path} is being written by another process; wait for that one, give each its own --shard, "
                "or choose another --output"
            ) from None
        except OSError:  # a file system without locks: two processes would only do the same work twice
            return

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._file.flush()
        os.fsync(self._file.fileno())


def _rows(name: str, record: Record) -> list[Sequence[Any]]:
    spacing = record["spacing"]
    return [
        (name, label, pixels, f"{pixels * spacing[0] * spacing[1]:.4f}" if spacing else "")
        for label, pixels in record["pixels"].items()
    ]


def _lines(rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
