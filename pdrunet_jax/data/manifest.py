"""manifest.csv: the table of a dataset's images and masks, also as spreadsheets save it."""

import csv
import io
import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pdrunet_jax.runtime.files import atomic_write
from pdrunet_jax.runtime.opening import read_regular

MANIFEST = "manifest.csv"
COLUMNS = ("image", "mask", "patient", "split")
"""Columns that mean something; their names may have capitals. Others are kept."""

_SEPARATORS = ",;\t|"
_SEP_LINE = re.compile(r'"?sep=(.)"?\r?\n', re.IGNORECASE)  # Excel's own first line
_EMPTY_LINES = re.compile(r'(?:[ \t,;|"]*\r?\n)+')
_BOMS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


@dataclass(frozen=True)
class Manifest:
    """The rows of a manifest, without empty ones."""

    columns: list[str]
    rows: list[dict[str, str]]
    lines: list[int]
    """The line of the file on which each row ends."""
    notes: list[str] = field(default_factory=list)
    """Remarks on how it was read."""


def read_manifest(root: Path) -> Manifest:
    """Read manifest.csv in any encoding and with any separator of spreadsheets.

    Raises `ValueError` with the reason if it is not a valid table.
    """
    try:
        text, encoding = decode_text(read_regular(root / MANIFEST))
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None
    if "\0" in text:
        raise ValueError("holds NUL characters, as UTF-16 text without its mark does; save it as CSV UTF-8")
    start = _EMPTY_LINES.match(text)
    stated = _SEP_LINE.match(text, start.end() if start else 0)
    found = stated or start
    end = found.end() if found else 0
    skipped, text = len(text[:end].splitlines()), text[end:]
    tables = {each: _columns(text, each) for each in (stated.group(1) if stated else _SEPARATORS)}
    separator = max(tables, key=lambda each: len({*tables[each]} & {*COLUMNS}))
    columns = tables[separator]
    if missing := [column for column in COLUMNS[:2] if column not in columns]:
        known = ", ".join(filter(None, columns)) or "absent"
        raise ValueError(f"no column {' and '.join(missing)}; columns are {known}")
    if repeated := [column for column in (*COLUMNS, "spacing") if columns.count(column) > 1]:
        raise ValueError(f"several columns are named {repeated[0]}; remove or rename all but one")
    first = {name: place for place, name in reversed(list(enumerate(columns)))}
    columns = [name if first[name] == place else "" for place, name in enumerate(columns)]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    rows, lines = [], []
    try:
        next(reader)
        for cells in reader:
            row = dict.fromkeys(columns, "") | dict(zip(columns, map(str.strip, cells), strict=False))
            row.pop("", None)
            if any(row.values()):
                rows.append(row)
                lines.append(reader.line_num + skipped)
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num + skipped}: {error}") from None
    guessed = f"{MANIFEST} is not UTF-8 text; read as Windows-1252, as Excel saves CSV"
    return Manifest([name for name in columns if name], rows, lines, [guessed] if encoding == "cp1252" else [])


def write_manifest(root: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write the manifest, with the columns of the first row. Raises `OSError`."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(root / MANIFEST, text.getvalue())


def normal_path(path: str) -> str:
    """A manifest's path in normal form, as in `Pair.id`."""
    return posixpath.normpath(path.replace("\\", "/"))


def decode_text(data: bytes) -> tuple[str, str]:
    """A text as spreadsheets and shells save it, and its encoding, a guess if it is cp1252. Raises `ValueError`."""
    stated = next((name for mark, name in _BOMS if data.startswith(mark)), None)
    try:
        return data.decode(stated or "utf-8"), stated or "utf-8"
    except UnicodeDecodeError:
        if stated:
            raise ValueError(f"not valid {stated.removesuffix('-sig').upper()}, as its first bytes say") from None
    try:
        return data.decode("cp1252"), "cp1252"
    except UnicodeDecodeError:
        raise ValueError("neither UTF-8, UTF-16 nor Windows-1252 text; save it as UTF-8") from None


def _columns(text: str, separator: str) -> list[str]:
    """Names in the first line, the known ones in small letters; those of unnamed columns are empty."""
    try:
        names = next(csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True), [])
    except csv.Error:
        return []
    names = [name.strip().lower() if name.strip().lower() in COLUMNS else name.strip() for name in names]
    return names
