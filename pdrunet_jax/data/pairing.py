"""Pair images with masks by their names, never by their order."""

import posixpath
import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from pdrunet_jax.data.images import SUFFIXES, stem

_MASK_WORDS = frozenset(
    {"mask", "masks", "seg", "segm", "segs", "segmentation", "segmentations", "label", "labels", "labelmap"}
    | {"gt", "groundtruth", "annotation", "annotations", "anno"}
)
_IMAGE_WORDS = frozenset({"image", "images", "img", "imgs", "xray", "scan", "photo", "picture", "orig", "original"})
_SEPARATORS = re.compile(r"[-_. ]+")
_NUMBER = re.compile(r"_\d{1,3}$")
_CHANNEL = re.compile(r"_\d{4}$")


class Matches(NamedTuple):
    """Result of `match`."""

    pairs: list[tuple[str, str]]
    """Image and mask."""
    lonely: list[str]
    """Images without a mask."""
    unused: list[str]
    """Masks without an image."""
    problems: list[str]


def match(images: Sequence[str], masks: Sequence[str], folders: tuple[str, str], *, nnunet: bool = False) -> Matches:
    """Pair `images` with `masks`, both paths, by their paths below the two `folders`.

    In this order, each file at most once: the same path but for the extension; the mask's name with words such as
    "mask", "seg" or "gt"; words such as "image" in the image's name, too. Upper and lower case, and the two Unicode
    spellings of a letter, are the same. With `nnunet`, an image also has the number of its channel.
    """
    result = Matches([], [], [], [])
    of_image, of_mask = _keys(images, folders[0]), _keys(masks, folders[1])
    mask_of: dict[str, str] = {}
    settled: set[str] = set()  # paths in a pair or a problem
    for paths in _grouped(of_image).values():
        if len(paths) > 1:
            result.problems.append(f"{', '.join(paths)}: several images with the same name")
            settled.update(paths)
    plain = _without_channel if nnunet else _plain
    for left, right in ((_same, _same), (plain, _bare_mask), (_bare_image, _bare_mask)):
        wanted = _grouped({path: left(key) for path, key in of_image.items() if path not in settled})
        offered = _grouped({path: right(key) for path, key in of_mask.items() if path not in settled})
        for key in wanted.keys() & offered.keys():
            owners, found = wanted[key], offered[key]
            if len(owners) > 1:
                channels = "; of several channels, only one is read: leave its files" if nnunet else ""
                result.problems.append(f"{', '.join(found)}: a mask of several images: {', '.join(owners)}{channels}")
            elif len(found) > 1:
                result.problems.append(f"{owners[0]}: several masks: {', '.join(found)}")
            else:
                mask_of[owners[0]] = found[0]
            settled.update(owners, found)
    owner_of = {plain(key): path for path, key in of_image.items() if path in mask_of}
    for path, key in of_mask.items():
        if path in settled:
            continue
        bare = _bare_mask(key)
        owner = owner_of.get(bare) or owner_of.get(_NUMBER.sub("", bare))
        if owner is None:
            result.unused.append(path)
        else:
            result.problems.append(f"{owner}: several masks: {mask_of[owner]}, {path}")
    result.pairs.extend(sorted(mask_of.items()))
    result.lonely.extend(path for path in of_image if path not in settled)
    result.problems.sort()
    return result


def masks_among(paths: Sequence[str]) -> list[str]:
    """Those of `paths` that are named as masks of others of them in the same folder."""
    keys = _keys(paths, "")
    plain = {_plain(key) for key in keys.values()} | {_bare_image(key) for key in keys.values()}

    def is_mask(key: str) -> bool:
        bare = _bare_mask(key)
        return bare != _plain(key) and (bare in plain or _NUMBER.sub("", bare) in plain)

    return [path for path, key in keys.items() if is_mask(key)]


def stems(path: str, folder: str) -> set[str]:
    """Every key that a file of an unknown format below `folder` may have, however many extensions it has."""
    key = composed(PurePosixPath(path).relative_to(folder).as_posix())
    inside, _, name = key.rpartition("/")
    parts = name.split(".")
    keys = (posixpath.join(inside, ".".join(parts[:count])) for count in range(1, len(parts) + 1))
    return {each for key in keys for each in (_plain(key), _bare_mask(key))}


def key_below(path: str, folder: str) -> str:
    """The key of an image at `path` below `folder`, comparable with `stems`."""
    return _plain(_key(path, folder))


def layer_keys(image: str, folder: str, name: str) -> set[str]:
    """The keys of class `name`'s own mask of an image below `folder`: `NAME/IMAGE` and `IMAGE_NAME`."""
    key = _key(image, folder)
    return {_plain(f"{name}/{key}"), _plain(f"{key}_{name}")}


def layer_mask_keys(path: str, folder: str) -> set[str]:
    """The keys, comparable with `layer_keys`, of a mask below `folder`: with words such as "mask", and without."""
    key = _key(path, folder)
    return {_plain(key), _bare_mask(key)}


def is_channel(path: str) -> bool:
    """Whether a file is named as nnU-Net's second or a later channel."""
    found = _CHANNEL.search(stem(path))
    return found is not None and found[0] != "_0000"


def _keys(paths: Sequence[str], folder: str) -> dict[str, str]:
    return {path: _key(path, folder) for path in paths}


def _key(path: str, folder: str) -> str:
    return composed(stem(PurePosixPath(path).relative_to(folder).as_posix() if folder else path))


def composed(text: str) -> str:
    """`text` in composed Unicode: macOS takes letters and their accents apart."""
    return unicodedata.normalize("NFC", text)


def folded(name: str) -> str:
    """A file's name for comparison: capitals and the two Unicode spellings of a letter are the same."""
    return composed(name).casefold()


def _grouped(keys: Mapping[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for path, key in keys.items():
        groups[key].append(path)
    return groups


def _same(key: str) -> str:
    return key


def _plain(key: str) -> str:
    return _without(key, frozenset())


def _without_channel(key: str) -> str:
    return _plain(_CHANNEL.sub("", key))


def _bare_mask(key: str) -> str:
    return _without(stem(key) if any(key.lower().endswith(suffix) for suffix in SUFFIXES) else key, _MASK_WORDS)


def _bare_image(key: str) -> str:
    return _without(key, _IMAGE_WORDS)


def _without(key: str, words: frozenset[str]) -> str:
    """A key in lower case with one separator between words, without `words`, unless nothing would be left."""
    *folders, name = key.casefold().split("/")
    name = re.sub(r"ground[-_ ]truth", "groundtruth", name)
    parts = [part for part in _SEPARATORS.split(name) if part]
    return "/".join([*folders, "_".join([part for part in parts if part not in words] or parts)])
