"""Files of other tools: JSON and XML within bounds, and images found by the paths that annotations state.

Annotations are untrusted. A path in them is only compared with the files below the folder that the user named.
"""

import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree

from pdrunet_jax.data.folder import split_named
from pdrunet_jax.data.images import SUFFIXES, read_bytes
from pdrunet_jax.data.pairing import composed, folded
from pdrunet_jax.data.walk import files_below, some
from pdrunet_jax.runtime.errors import DataError, UserError

MOST_BYTES = 256 << 20
"""Largest annotation file that is read."""

_GENERIC = re.compile(
    "(img|image|ann|annotation|json|label|mask|xray)s?|jpegimages|segmentationclass(png)?|xml|labelme|default|data",
    re.I,
)
"""Folder names that say what a file is, not which one."""

RESULT = re.compile(r"_(mask|overlay|probability(_[^./]*)?)\.png$")
"""Names of the pictures that the predict command writes beside the polygons and volumes to correct."""

_DOUBLE = (".nii.gz", ".seg.nrrd")  # extensions of two parts

_UPLOAD = re.compile(r"^[0-9a-f]{8}-")  # Label Studio puts this in front of the names of uploaded files


def problem(name: str, what: str) -> DataError:
    """The error for one file, in the form in which the problems of a source are collected."""
    return DataError("unreadable annotation", [f"{name}: {what}"])


def read_text(path: Path, name: str, encoding: str = "utf-8") -> str:
    """The text of an annotation file: UTF-8, or else `encoding`. Raises `DataError` that calls the file `name`."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise problem(name, error.strerror or str(error)) from None
    if size > MOST_BYTES:
        raise problem(name, f"{size >> 20} MiB; at most {MOST_BYTES >> 20} are read")
    data = read_bytes(path, name)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        if encoding != "utf-8":
            try:
                return data.decode(encoding)
            except (UnicodeDecodeError, LookupError):
                raise problem(name, f"neither UTF-8 nor {encoding} text") from None
    raise problem(
        name,
        "not UTF-8 text. Name its encoding, such as --encoding gb18030 (Chinese), cp949 (Korean), shift_jis (Japanese) "
        "or cp1252 (Western), or convert it: iconv -f gb18030 -t utf-8",
    )


def read_json(path: Path, name: str, encoding: str = "utf-8") -> Any:
    """The content of a JSON file. Raises `DataError` that calls it `name`."""
    text = read_text(path, name, encoding)
    try:
        return json.loads(text)
    except RecursionError:
        raise problem(name, "nested too deeply to be annotations") from None
    except ValueError as error:  # also a number of thousands of digits
        raise problem(name, f"not valid JSON ({error})") from None


def read_xml(path: Path, name: str, encoding: str = "utf-8") -> ElementTree.Element:
    """The root of an XML file. Raises `DataError` that calls it `name`."""
    text = read_text(path, name, encoding)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:  # entities can expand without end, or name other files
        raise problem(name, "XML with a document type, which annotations do not have; refused")
    try:
        return ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise problem(name, f"not valid XML ({error})") from None


def read_all(
    source: Path, suffix: str, read: Callable[[Path, str, str], Any], encoding: str, problems: list[str]
) -> Iterator[tuple[str, Any]]:
    """Yield the POSIX path and the content, by `read`, of each file below `source` with the extension `suffix`.

    The problems of files that cannot be read are added to `problems`.
    """
    for path in files_below(source):
        name = path.relative_to(source).as_posix()
        if path.suffix.lower() != suffix:
            continue
        try:
            if not is_inside(path, source):
                raise problem(name, "a link that leads out of the folder; refused")
            content = read(path, name, encoding)
        except DataError as error:
            problems += error.problems
            continue
        yield name, content


def check_encoding(encoding: str) -> None:
    """Raise `UserError` unless Python can decode text in `encoding`."""
    try:
        b"a".decode(encoding)
    except UnicodeError:  # of two bytes or more a letter
        return
    except LookupError:
        raise UserError(f"--encoding {encoding}: unknown; try gb18030, cp949, shift_jis or cp1252") from None


def split_of(path: str) -> str | None:
    """The split that a folder in a POSIX path stands for, such as train for train2017/a.png; None without one."""
    return next(filter(None, map(split_named, PurePosixPath(path).parts[:-1])), None)


def writable(text: str) -> bool:
    """Whether `text` has no control characters or surrogates, which files and logs cannot hold."""
    return re.search("[\x00-\x1f\x7f\ud800-\udfff]", text) is None


def without_area(skipped: Mapping[str, int]) -> list[str]:
    """A remark on the kinds of shapes that were skipped, with their numbers; nothing if none was."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in skipped.items())
    return [f"skipped, having no area: {kinds}"] if skipped else []


def short(value: Any) -> str:
    """A value from a file, for a message."""
    text = f"a {type(value).__name__}" if isinstance(value, list | dict) else repr(value)
    return text if len(text) < 60 else f"{text[:50]}..."


def number(value: Any) -> float | None:
    """`value` if it is a finite number below 1e9 in size; None for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
        return None
    return float(value)


def is_inside(path: Path, root: Path) -> bool:
    """Whether `path`, with all links followed, lies below `root`."""
    base, target = os.path.realpath(root), os.path.realpath(path)
    return os.path.commonpath([base, target]) == base != target


class Images:
    """The image files below a folder, found by the paths that other tools state."""

    def __init__(
        self, root: Path, suffixes: Iterable[str] = SUFFIXES, is_mask: Callable[[str], bool] = lambda name: False
    ) -> None:
        """List the files below `root` with one of `suffixes`, except those whose POSIX paths `is_mask` takes."""
        self.root = root
        known = tuple(suffixes)
        names = [path.relative_to(root).as_posix() for path in files_below(root)]
        self.names = [name for name in names if name.lower().endswith(known) and not is_mask(name)]
        """POSIX paths below the root."""
        self._known = {composed(name): name for name in self.names}
        self._by_name: dict[str, list[str]] = defaultdict(list)
        self._by_stem: dict[str, list[str]] = defaultdict(list)
        for name in self.names:
            self._by_name[folded(PurePosixPath(name).name)].append(name)
            self._by_stem[folded(stem_of(name))].append(name)
        self.moved: list[str] = []
        """Images that are not where the annotations say, found by their names."""

    def find(self, stated: str, folder: str, where: str, *, beside: bool = True) -> str | None:
        """The image that the annotation file `where`, in `folder`, calls `stated`; None if there is none.

        It is the file at that path, from `folder` or from the root. Otherwise the path is from another computer, and
        the file's name counts: a file in `folder` or in a folder that corresponds to it (`ann/p1` and `img/p1`), or,
        unless `beside`, the only file with this name. The extension and capitals may differ.

        Raises `DataError` if `stated` is no path, a link leads out of the root, or several files have the name.
        """
        path = _plain(stated)
        name = PurePosixPath(path).name
        if not name or name == ".." or not writable(stated):
            raise problem(where, f"image path {short(stated)} names no file")
        for start in dict.fromkeys((folder, "")):
            if not PurePosixPath(path).is_absolute():
                exact = composed(os.path.normpath(os.path.join(start, path)).replace(os.sep, "/"))
                if exact in self._known:
                    return self._checked(self._known[exact], where)
        found = self._named(name, path, folder, beside) or self._named(_UPLOAD.sub("", name), path, folder, beside)
        if len(found) > 1:
            raise problem(where, f"image {short(stated)} may be any of {some(found)}")
        if found:
            self.moved.append(found[0])
        return self._checked(found[0], where) if found else None

    def _named(self, name: str, path: str, folder: str, beside: bool) -> list[str]:
        stem = folded(PurePosixPath(name).stem)
        for candidates in (self._by_name[folded(name)], self._by_stem[stem]):
            near = [other for other in candidates if places(other) == places(f"./{folder}/x")]
            if len(near) > 1:  # the file beside the annotation comes first
                near = [
                    other for other in near if PurePosixPath(composed(other)).parent == PurePosixPath(composed(folder))
                ] or near
            if near:
                return near
            if not beside and candidates:
                ends = [other for other in candidates if _common_end(other, path) > 1]
                return ends if len(ends) == 1 else candidates
        return []

    def _checked(self, name: str, where: str) -> str:
        if not is_inside(self.root / name, self.root):
            raise problem(where, f"image {name} is a link that leads out of {self.root}; refused")
        return name

    def pairs(self, path: str) -> list[str]:
        """The images with the name of `path`, apart from the extension, in the folder that corresponds to its own."""
        names = self._by_stem[folded(stem_of(path))]
        return [self._checked(name, path) for name in names if places(name) == places(path)]

    def notes(self) -> list[str]:
        """A remark on the images that were found by their names."""
        if not self.moved:
            return []
        return [f"{len(self.moved)} images are not at the path stated; found by their file names: {some(self.moved)}"]


def _plain(stated: str) -> str:
    """A path or URL as a POSIX path, without drive and server."""
    path = stated
    if "://" in path or path.startswith("/data/local-files"):
        try:
            parts = urlsplit(path)
        except ValueError:
            return path
        path = unquote(parse_qs(parts.query).get("d", [parts.path])[0])
    return re.sub("^[A-Za-z]:", "/", path.strip().replace("\\", "/"))


def stem_of(path: str) -> str:
    """The name of the file at a POSIX path without its extension, such as .png, .nii.gz or .seg.nrrd."""
    name = PurePosixPath(path).name
    double = next((end for end in _DOUBLE if name.lower().endswith(end) and len(name) > len(end)), None)
    return name[: -len(double)] if double else PurePosixPath(name).stem


def places(path: str) -> list[str]:
    """The folders of a path that tell files apart."""
    return [part for part in PurePosixPath(composed(path)).parts[:-1] if not _GENERIC.fullmatch(part)]


def _common_end(one: str, other: str) -> int:
    """How many parts at the end of two paths are the same."""
    pairs = zip(reversed(PurePosixPath(one).parts), reversed(PurePosixPath(other).parts), strict=False)
    count = 0
    for ours, theirs in pairs:
        if folded(ours) != folded(theirs):
            break
        count += 1
    return count
