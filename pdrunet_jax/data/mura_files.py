"""MURA's folders: its images by their paths, and masks that go by such paths."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pdrunet_jax.data.images import SUFFIXES
from pdrunet_jax.data.layouts import files_below
from pdrunet_jax.data.mura_masks import annotated_path
from pdrunet_jax.errors import DataError, UserError

_VIEW = re.compile(
    r"(?:(?P<split>train|valid)[/_.-]+)?"
    r"(?:(?P<region>XR[_-][A-Z]+)[/_.-]+)?"
    r"(?P<patient>patient\d+)[/_.-]+"
    r"(?P<study>study\d+)(?:[_-](?P<finding>positive|negative))?[/_.-]+"
    r"(?P<image>image\d+)(?:_mask|_seg|_label)?$",
    re.IGNORECASE,
)
"""MURA's path of an image without its extension, also with other separators, or without its first folders."""


@dataclass(frozen=True)
class View:
    """One of MURA's images."""

    split: str
    """ "train" or "valid": MURA's own."""
    region: str
    patient: str
    study: str
    finding: str
    image: str
    path: Path

    @property
    def name(self) -> str:
        """MURA's relative path, without the extension."""
        study = f"{self.study}_{self.finding}" if self.finding else self.study
        return f"{self.split}/{self.region}/{self.patient}/{study}/{self.image}"


def mura_root(source: Path, masks: Path) -> Path:
    """The folder with MURA's train/ and valid/: `source`, or the one in it. Raises `UserError` if there is none.

    The folder of `masks` may look like MURA's, and is not.
    """
    if _is_root(source):
        return source
    inside = sorted(source.iterdir()) if source.is_dir() else []
    found = [folder for folder in inside if _is_root(folder) and folder.resolve() != masks.resolve()]
    if len(found) > 1:
        raise UserError(f"{source} has several folders like MURA: {', '.join(map(str, found))}; name one")
    if not found:
        raise UserError(
            f"{source} is not MURA: it has no train/XR_* and no valid/XR_*, nor has a folder in it.\n"
            "MURA is free of charge after registration: https://stanfordmlgroup.github.io/competitions/mura/"
        )
    return found[0]


def _is_root(folder: Path) -> bool:
    return any(path.is_dir() for split in ("train", "valid") for path in (folder / split).glob("XR_*"))


def find_views(root: Path, regions: Iterable[str]) -> list[View]:
    """MURA's images of `regions`, in the order of their paths."""
    views = []
    for split in ("train", "valid"):
        for region in regions:
            folder = root / split / region
            for path in files_below(folder) if folder.is_dir() else ():
                match = _VIEW.fullmatch(path.relative_to(root).with_suffix("").as_posix())
                if match and path.suffix.lower() in SUFFIXES:
                    parts = {key: str(value or "").lower() for key, value in match.groupdict().items()}
                    views.append(View(**{**parts, "split": split, "region": region}, path=path))
    return views


def match_masks(
    folder: Path, views: Sequence[View], regions: Sequence[str]
) -> tuple[dict[View, Path], list[str], list[str]]:
    """The mask of each view that has one, what the log should say, and what is wrong.

    If there are LabelMe files, they are the masks, and images beside them are not.
    """
    candidates, problems = _candidates(folder, views)
    by_core: dict[tuple[str, str, str], list[View]] = defaultdict(list)
    for view in views:
        by_core[view.patient, view.study, view.image].append(view)
    matched: dict[View, Path] = {}
    elsewhere: Counter[str] = Counter()
    for path, words in candidates:
        name = path.relative_to(folder).as_posix()
        match = _VIEW.search(words)
        if not match:
            problems.append(f"{name}: {words} is no path of an image in MURA")
            continue
        named = {key: (value or "").lower() for key, value in match.groupdict().items()}
        region = named["region"].replace("-", "_").upper()
        if region and region not in regions:
            elsewhere[region] += 1
            continue
        found = [
            view
            for view in by_core.get((named["patient"], named["study"], named["image"]), [])
            if named["split"] in ("", view.split)
            and named["finding"] in ("", view.finding)
            and region in ("", view.region)
        ]
        if len(found) != 1:
            where = ", ".join(view.name for view in found)
            reason = f"fits several images: {where}" if found else f"a mask without an image ({match.group(0)})"
            problems.append(f"{name}: {reason}")
        elif found[0] in matched:
            first = matched[found[0]].relative_to(folder).as_posix()
            problems.append(f"{name}: {found[0].name} has a mask already: {first}")
        else:
            matched[found[0]] = path
    notes = [f"{count} masks of {region} are left out: not asked for" for region, count in sorted(elsewhere.items())]
    return matched, notes, problems


def _candidates(folder: Path, views: Sequence[View]) -> tuple[list[tuple[Path, str]], list[str]]:
    """The masks below `folder`, each with the words that may be MURA's path, and what is wrong."""
    originals = {os.path.realpath(view.path) for view in views}
    drawn: list[tuple[Path, str]] = []
    images: list[tuple[Path, str]] = []
    problems: list[str] = []
    for path in files_below(folder):
        name = path.relative_to(folder)
        words: str | None = name.with_suffix("").as_posix()
        if path.suffix.lower() == ".json":
            try:
                if not _VIEW.search(str(words)):
                    words = annotated_path(path, name.as_posix())
            except DataError as error:
                problems += error.problems
                continue
            if words is not None:
                drawn.append((path, words))
        elif path.suffix.lower() in SUFFIXES and os.path.realpath(path) not in originals:
            images.append((path, str(words)))
    return drawn or images, problems
