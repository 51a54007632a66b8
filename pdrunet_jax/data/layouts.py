"""The layouts of dataset folders: which folders hold images, masks and splits."""

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from pdrunet_jax.data.folder import (
    DESCRIPTION,
    NNUNET,
    SPLITS,
    LayoutResult,
    Pair,
    declared_file,
    pairs_of_manifest,
    split_named,
)
from pdrunet_jax.data.hints import hint, importer_of
from pdrunet_jax.data.images import FORMATS, has_image_name
from pdrunet_jax.data.manifest import MANIFEST
from pdrunet_jax.data.pairing import Matches, is_channel, key_below, masks_among, match, stems
from pdrunet_jax.data.walk import SEEN, SYSTEM, is_litter, passed_over, some, walk, walk_images
from pdrunet_jax.runtime.errors import DataError

_IMAGES = ("images", "image", "imgs", "img")
_MASKS = ("masks", "mask", "labels", "label", "annotations", "segmentations")
"""Names of folders, in any case."""


class Files(NamedTuple):
    """The images below a folder, as paths below the dataset, and files of formats that are not read."""

    images: list[str]
    others: list[str]


def find_pairs(root: Path) -> LayoutResult:
    """Pair the images and masks below `root`; `layout` is empty if none is recognised. Raises `UserError`."""
    if declared_file(root, MANIFEST):
        return pairs_of_manifest(root)
    return Finder(root).find()


class Finder:
    """Finds the layout of `root`, and the mask of each image; folders are named by their paths below `root`."""

    def __init__(self, root: Path) -> None:
        self.root, self.found = root, LayoutResult()
        self.passed: dict[str, list[Path]] = defaultdict(list)
        self.resolved = {root: root.resolve()}

    def find(self) -> LayoutResult:
        """The pairs, with a remark for each kind of file that is passed over; a problem if nothing else is there."""
        self._find()
        remarks = passed_over(self.passed, self._below)
        if self.found.layout and not (self.found.pairs or self.found.problems):
            self.found.problems += [f"no image has a format that is read here: {FORMATS}", *remarks]
        several = any("several masks" in problem for problem in self.found.problems)
        told = any("may read it" in problem for problem in self.found.problems)
        if self.found.problems and not told and (several or not self.found.pairs) and (advice := self._hint()):
            self.found.problems[0] += f"\n    {advice}"
        self.found.notes += remarks
        if outside := [pair.id for pair in self.found.pairs if self._is_outside(pair.image)]:
            self.found.notes.append(f"{len(outside)} images are outside the dataset folder (links): {some(outside)}")
        return self.found

    def _hint(self) -> str:
        return hint([path.relative_to(self.root).as_posix() for path in walk(self.root).files])

    def _find(self) -> None:
        found, top = self.found, self._entries("")
        splits = {name: split for name in top if (split := split_named(name)) and self._is_folder(name)}
        splits = dict(sorted(splits.items(), key=lambda item: SPLITS.index(item[1])))
        inner = {name: self._images_and_masks(name) for name in splits}
        inner = {name: folders for name, folders in inner.items() if any(folders)}
        images, masks = self._images_and_masks("")
        used: set[str | None] = {images, masks}
        if inner:
            found.layout, used = "{train,val,test}/{images,masks}", {*inner}
            for name, folders in inner.items():
                self._pair((folders[0] or f"{name}/images", folders[1] or f"{name}/masks"), splits[name])
        elif images or masks:
            found.layout = "images/ and masks/"
            self._pair((images or "images", masks or "masks"))
        elif "imagesTr" in top:
            found.layout, used = "nnU-Net imagesTr/labelsTr", {"imagesTr", "labelsTr"}
            tested = {"imagesTs", "labelsTs"} <= set(top)
            self._pair(("imagesTr", "labelsTr"), "train" if tested else None, nnunet=True)
            if tested:
                used |= {"imagesTs", "labelsTs"}
                self._pair(("imagesTs", "labelsTs"), "test", nnunet=True)
        else:
            self._one_folder(splits)
            return
        self._pass_over([name for name in top if name not in used])

    def _one_folder(self, splits: dict[str, str]) -> None:
        """Images and masks in one folder, or in one for each split."""
        folders: dict[str, str | None] = dict(splits) if splits else {"": None}
        files = {folder: self._files(folder).images for folder in folders}
        masks = {folder: set(masks_among(paths)) for folder, paths in files.items()}
        if not any(masks.values()):
            return
        self.found.layout = "images and masks in one folder"
        for folder, split in folders.items():
            images = [path for path in files[folder] if path not in masks[folder]]
            if split == "test" and not masks[folder]:
                self._without_masks(folder, images)
                continue
            matches = match(images, sorted(masks[folder]), (folder, folder))
            self._add(matches, split, [f"{path}: no mask named {_names(path, '')}" for path in matches.lonely])
        if splits:
            self._pass_over([name for name in self._entries("") if name not in splits])

    def _pair(self, folders: tuple[str, str], split: str | None = None, *, nnunet: bool = False) -> None:
        """Pair the images of one folder with the masks of another."""
        missing = [folder for folder in folders if not (self.root / folder).is_dir()]
        before = len(self.found.problems)
        files = [self._files(folder) if folder not in missing else Files([], []) for folder in folders]
        if len(self.found.problems) > before:  # what lies in an unreadable folder would seem to be missing
            return
        images, masks = files[0].images, files[1].images
        if split == "test" and images and not masks and not files[1].others:
            self._without_masks(folders[0], images)
            return
        if missing:
            self.found.problems.append(f"{missing[0]}/ is missing")
            return
        tops = _split_folders(folders[0], images) if split is None and not nnunet else {}
        if not any(tops):
            self._match(images, files[1], folders, split, nnunet=nnunet)
            return
        if outside := tops.pop("", []):
            what = f"divided into train, val and test, but {len(outside)} images are in none of them: {some(outside)}"
            self.found.problems.append(f"{folders[0]}/ is {what}")
        mask_tops = _split_folders(folders[1], masks)
        for top, inside in tops.items():
            name = split_named(top)
            others = [each for each in mask_tops if each and split_named(each) == name]
            other = min(others, key=lambda each: each.lower() != top.lower(), default=top)
            part = mask_tops.pop(other, [])
            if name == "test" and not part:
                self._without_masks(f"{folders[0]}/{top}", inside)
            else:
                inner = f"{folders[0]}/{top}", f"{folders[1]}/{other}"
                unread = [path for path in files[1].others if path.startswith(f"{inner[1]}/")]
                self._match(inside, Files(part, unread), inner, name)
        self.found.problems += [f"{path}: a mask without an image" for rest in mask_tops.values() for path in rest]

    def _match(
        self, images: Sequence[str], masks: Files, folders: tuple[str, str], split: str | None, *, nnunet: bool = False
    ) -> None:
        matches = match(images, masks.images, folders, nnunet=nnunet)
        unread = {key: path for path in masks.others for key in stems(path, folders[1])}
        problems = []
        for path in matches.lonely:
            other = unread.get(key_below(path, folders[0]))
            if nnunet and is_channel(path):
                problems.append(f"{path}: a second channel; only images of one file are read")
            elif other is not None:
                reader = importer_of([other])
                remedy = f"{reader} may read it" if reader else "save it as PNG"
                problems.append(f"{path}: its mask {other} is in a format that is not read here; {remedy}")
            else:
                problems.append(f"{path}: no mask named {_names(path, folders[1], folders[0])}")
        self._add(matches, split, problems)

    def _add(self, matches: Matches, split: str | None, problems: Sequence[str]) -> None:
        root = self.root
        self.found.pairs += [Pair(image, root / image, mask, root / mask, None, split) for image, mask in matches.pairs]
        self.found.problems += [*matches.problems, *problems]
        self.found.problems += [f"{mask}: a mask without an image" for mask in matches.unused]

    def _without_masks(self, folder: str, images: Sequence[str]) -> None:
        self.passed[f"test images without masks in {folder}/"] += (self.root / image for image in images)

    def _pass_over(self, names: Sequence[str]) -> None:
        """Name what lies in the dataset folder, but is not part of its layout."""
        rest = [
            self.root / name
            for name in names
            if (self.root / name).is_dir() or has_image_name(Path(name)) or _is_table(name)
        ]
        self.passed["files and folders outside this layout"] += rest

    def _files(self, folder: str) -> Files:
        found = walk_images(self.root / folder)
        self.found.problems += [f"{self._below(path)}: {reason}" for path, reason in found.problems]
        for kind, paths in found.passed.items():
            self.passed[kind] += paths
        others = [path for kind, paths in found.passed.items() if kind not in (SYSTEM, SEEN) for path in paths]
        return Files(list(map(self._below, found.files)), list(map(self._below, others)))

    def _is_outside(self, path: Path) -> bool:
        folder = path.parent
        if folder not in self.resolved:
            self.resolved[folder] = folder.resolve()
        real = path.resolve() if path.is_symlink() else self.resolved[folder]
        return not real.is_relative_to(self.resolved[self.root])

    def _below(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _images_and_masks(self, folder: str) -> tuple[str | None, str | None]:
        images, masks = self._child(folder, _IMAGES), self._child(folder, _MASKS)
        return images, masks if images or PurePosixPath(masks or "").name.lower() == _MASKS[0] else None

    def _is_folder(self, name: str) -> bool:
        """Whether a name in `root` is a folder; a broken link is a problem."""
        path = self.root / name
        if path.is_symlink() and not path.exists():
            self.found.problems.append(f"{name}: a broken link to {os.readlink(path)}")
        return path.is_dir()

    def _child(self, folder: str, names: Sequence[str]) -> str | None:
        """The first folder inside `folder` with one of `names`, in any case."""
        inside = {name.lower(): name for name in reversed(self._entries(folder))}
        for name in names:
            path = PurePosixPath(folder, inside.get(name, name)).as_posix()
            if self._is_folder(path):
                return path
        return None

    def _entries(self, folder: str) -> list[str]:
        try:
            return [name for name in sorted(os.listdir(self.root / folder)) if not is_litter(name)]
        except OSError as error:
            where = self.root / folder
            raise DataError(f"--data.root {self.root}: unreadable", [f"{where}: {error.strerror}"]) from None


def _is_table(name: str) -> bool:
    """Whether a file seems to declare what only dataset.toml and manifest.csv do, such as manifest.xlsx."""
    path = PurePosixPath(name.lower())
    return path.stem in ("manifest", "dataset") and path.name not in (MANIFEST, DESCRIPTION, NNUNET)


def _split_folders(folder: str, paths: Sequence[str]) -> dict[str, list[str]]:
    """The paths in folder/train/, folder/val/ and folder/test/ by the name of that folder; others under ""."""
    result: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        top, *below = PurePosixPath(path).relative_to(folder).parts
        result[top if below and split_named(top) else ""].append(path)
    return result


def _names(image: str, folder: str, images: str = "") -> str:
    """The names that a mask of `image` may have, as patterns."""
    stem = PurePosixPath(image).relative_to(images).with_suffix("").as_posix() if images else image
    return f"{folder}/{stem}.*, or {PurePosixPath(stem).name}_mask.*, _seg, _label, _gt and the like"
