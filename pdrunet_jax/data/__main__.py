"""The subcommands that make other people's annotations a dataset folder.

`python -m pdrunet_jax.data`: makes and checks a dataset folder.

The split of a dataset that has grown: who was tested on stays there, and only newcomers are drawn.
"""

import csv
import io
import posixpath
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pdrunet_jax import config as config_io
from pdrunet_jax.config import Config, DataConfig
from pdrunet_jax.data.dataset import Inspection, inspect_dataset, report_lines
from pdrunet_jax.data.folder import MANIFEST, read_manifest
from pdrunet_jax.data.phantoms.files import PhantomOptions, write_phantoms
from pdrunet_jax.data.scan import foreground_share
from pdrunet_jax.data.split import assign, split_counts, together
from pdrunet_jax.runtime import cli
from pdrunet_jax.runtime.errors import DataError, UserError
from pdrunet_jax.runtime.files import atomic_write, writing

LABELME_HELP = """\
Make a folder of LabelMe annotations (*.json, versions 3 to 5) a dataset folder.

SOURCE holds the JSON files and the images, in any arrangement of folders; imagePath must not lead out of it. \
DST gets manifest.csv, dataset.toml, masks/ (index masks) and images/.

Polygons, rectangles, circles and mask shapes are drawn as LabelMe itself does, later ones over earlier ones; \
lines and points have no area and are skipped. The labels background and _background_ are drawn as background, \
__ignore__ as pixels that count neither in the loss nor in the metrics.

Every problem of every file is reported at once, and then nothing is written.

Example:
    python -m pdrunet_jax.data import-labelme annotations data/legs --classes femur 1 tibia 2"""

MURA_HELP = """\
Make MURA's radiographs with masks from elsewhere a dataset folder. MURA has no masks of its own.

MURA-v1.1 is free of charge after registration: https://stanfordmlgroup.github.io/competitions/mura/

Its licence forbids passing images on, so they stay where they are and DST refers to them.

Masks of humerus and forearm (CC BY 4.0): the FleXray data release, folder mura_forearm_humerus_annotations,
    https://huggingface.co/datasets/VictorButoi/flexray-data

Or draw your own in LabelMe.

Example:
    python -m pdrunet_jax.data import-mura MURA-v1.1 data/mura --region XR_HUMERUS --masks annotations
    python -m pdrunet_jax.data check data/mura
    python -m pdrunet_jax.train --config mura --data.root data/mura

A mask is a LabelMe file or an image, and goes by the path of its image in MURA, in folders or in one name:
    train/XR_HUMERUS/patient00001/study1_positive/image1.json
    train_XR_HUMERUS_patient00001_study1_positive_image1_mask.png

Hyphens and dots join names too. The split, the region, and positive or negative may be missing where that still \
names one image; _mask, _seg or _label may end it. A LabelMe file of another name goes by its imagePath. \
Where there are LabelMe files, images beside them are not taken for masks.

Patients of MURA's train become train and val, those of MURA's valid become test: none is in two. \
Images without a mask are left out, and counted. Masks without an image are errors, reported all at once."""


@dataclass(frozen=True)
class ImportLabelme:
    """Make a folder of LabelMe annotations a dataset folder."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Folder with the LabelMe files and the images."""
    dst: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """Dataset folder to write; it must not exist, or be empty."""
    classes: dict[str, int] = field(default_factory=dict)
    """Labels with mask values 1 to 254 (0 background, 255 ignored); left out, labels are numbered by name."""
    boxes: Literal["drop", "keep"] = "drop"
    """Rectangles around another shape of the same label: drop them as boxes, or keep them as regions."""
    by_reference: bool = False
    """Name the images by their absolute paths instead of copying them."""


@dataclass(frozen=True)
class ImportMura:
    """Make MURA's radiographs with masks from elsewhere a dataset folder."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """MURA's folder, the one with train/ and valid/, or the folder that it lies in."""
    dst: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """Dataset folder to write; it must not exist, or be empty."""
    masks: Path
    """Folder with the LabelMe files or mask images."""
    region: tuple[str, ...] = ("XR_HUMERUS",)
    """One or several of XR_ELBOW, XR_FINGER, XR_FOREARM, XR_HAND, XR_HUMERUS, XR_SHOULDER, XR_WRIST."""
    classes: dict[str, int | str] = field(default_factory=dict)
    """LabelMe: labels with mask values. Mask images: names with grey value, palette index, #rrggbb colour, or 1,2."""
    ignore: int | str | None = None
    """Value or colour in mask images that is left out of loss and metrics."""
    threshold: int | None = None
    """Grey value (of 255) from which a soft-edged mask image counts as foreground; 128 when left out."""
    boxes: Literal["drop", "keep"] = "drop"
    """LabelMe rectangles around another shape of the same label: drop them as boxes, or keep them as regions."""
    val_fraction: float = 0.2
    """Share of the patients of MURA's train that validate."""
    split_seed: int = 0
    """Seed of that choice."""


def described(command: type) -> Any:
    """`command` with its long help, if it is the one on the command line; the list of commands shows one line each."""
    name, text = {
        ImportLabelme: ("import-labelme", LABELME_HELP),
        ImportMura: ("import-mura", MURA_HELP),
    }[command]
    return Annotated[command, tyro.conf.subcommand(name, description=text)] if name in sys.argv[1:2] else command


def import_labelme(options: ImportLabelme) -> None:
    """Import and say what was found. Raises `UserError`."""
    from pdrunet_jax.data.importers import labelme

    with _files_named():
        notes = labelme.import_labelme(
            options.source,
            options.dst,
            classes=options.classes,
            boxes=options.boxes,
            by_reference=options.by_reference,
        )
    print("\n".join([*notes, f"written to {options.dst}"]))


def import_mura(options: ImportMura) -> None:
    """Import and say what was found. Raises `UserError`."""
    from pdrunet_jax.data.importers import mura

    with _files_named():
        notes = mura.import_mura(
            options.source,
            options.dst,
            options.region,
            options.masks,
            classes=options.classes,
            ignore=options.ignore,
            threshold=options.threshold,
            boxes=options.boxes,
            val_fraction=options.val_fraction,
            split_seed=options.split_seed,
        )
    print("\n".join([*notes, f"written to {options.dst}"]))


@contextmanager
def _files_named() -> Iterator[None]:
    """A file or folder that cannot be read is the user's to mend."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror or error}") from None


@dataclass(frozen=True)
class _Folder:
    root: tyro.conf.Positional[Path]
    """Dataset folder."""
    classes: dict[str, int | str] = field(default_factory=dict)
    """Class names with their grey value, palette index or #rrggbb colour, or several (1,2); overrides dataset.toml."""
    ignore: int | str | None = None
    """Mask value or colour that is left out of loss and metrics, or several (1,2)."""
    threshold: int | None = None
    """Grey value (of 255) from which a soft-edged binary mask counts as foreground; 128 when left out."""
    patient_regex: str | None = None
    """Regular expression whose first group (or whole match) in the image's path is the patient."""
    val_fraction: float = 0.2
    """Share of the patients that validate, where the dataset declares no split."""
    test_fraction: float = 0.2
    """Share of the patients that test, where the dataset declares no split."""
    split_seed: int = 0
    """Seed of that split."""

    def config(self) -> DataConfig:
        """These options as settings. Raises `UserError`."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name in _SETTINGS}
        config = Config(data=DataConfig(**{**values, "root": str(self.root)}))
        return config_io.check(config, "the command line").data


_SETTINGS = DataConfig.__dataclass_fields__


@dataclass(frozen=True)
class Check(_Folder):
    """Read every file and report what is there, or everything that is wrong."""

    output: Path | None = None
    """Folder for check.html and contact_sheet.png: the report, and images with their masks drawn over them."""
    pictures: int = 24
    """Images on the contact sheet, from the least foreground to the most."""


@dataclass(frozen=True)
class Split(_Folder):
    """Write a patient-disjoint split into the folder's manifest.csv, making that if there is none."""

    keep: Path | None = None
    """An earlier dataset folder whose patients keep the split that they have there; only others are drawn."""


@dataclass(frozen=True)
class Phantom(PhantomOptions):
    """Draw synthetic X-rays of long bones with exact masks."""

    root: tyro.conf.Positional[Path] = tyro.MISSING
    """Folder to write; it must not exist, or be empty."""


def check(options: Check) -> None:
    """Print counts, sizes, modes, classes, patients, splits and notes. Raises `DataError` with every problem."""
    if options.pictures < 1:
        raise UserError(f"--pictures {options.pictures}: at least one image makes a contact sheet")
    inspection = inspect_dataset(options.config())
    lines = report_lines(inspection)
    print("\n".join(lines))
    if options.output is None:
        print("pictures  add --output FOLDER to see masks over images")
        return
    from pdrunet_jax.data.contact_sheet import write_check

    print(f"pictures  {write_check(options.output, inspection, lines, options.pictures)}")


def split(options: Split) -> None:
    """Add the split to the manifest. Raises `UserError` if one is declared already."""
    config = options.config()
    inspection = inspect_dataset(config)
    root, samples = options.root, inspection.dataset.samples
    path = root / MANIFEST
    if options.keep is not None:
        pass

        earlier = inspect_dataset(replace(config, root=str(options.keep)))
        splits, kept = continue_split(inspection, earlier, config)
        samples = tuple(replace(sample, split=splits[sample.id]) for sample in samples)
        print(f"{kept} of {len(samples)} images have the split of their patient in {options.keep}")
    if path.is_file():
        columns, rows = read_manifest(root)
        if "split" in columns:
            raise UserError(f"{path} has a split; remove that column to draw another")
        splits = {sample.id: sample.split for sample in samples}
        for row in rows:
            row["split"] = splits[posixpath.normpath(row["image"].replace("\\", "/"))]
    else:
        columns = ["image", "mask", "patient"]
        rows = [
            {
                "image": sample.id,
                "mask": sample.mask.relative_to(root).as_posix() if sample.mask else "",
                "patient": sample.patient,
                "split": sample.split,
            }
            for sample in samples
        ]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*columns, "split"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with writing(path):
        atomic_write(path, text.getvalue())
    print(f"{path}: {split_counts(samples)}")


def phantom(options: Phantom) -> None:
    """Write phantoms. Raises `UserError` if something is there."""
    write_phantoms(options.root, options)
    print(f"{options.root}: {options.count} images of {options.size}x{options.size} pixels")
    if options.annotations == "labelme":
        print(f"next      python -m pdrunet_jax.data import-labelme {options.root} FOLDER")


def main() -> None:
    """Run the subcommand of the command line."""
    commands: Any = Check | Split | described(ImportLabelme) | described(ImportMura) | Phantom
    options = tyro.cli(commands, prog="python -m pdrunet_jax.data", description=__doc__)
    if isinstance(options, Check):
        check(options)
    elif isinstance(options, Split):
        split(options)
    elif isinstance(options, ImportLabelme):
        import_labelme(options)
    elif isinstance(options, ImportMura):
        import_mura(options)
    elif isinstance(options, Phantom):
        phantom(options)


def continue_split(new: Inspection, old: Inspection, config: DataConfig) -> tuple[dict[str, str], int]:
    """A split for each image of `new`, by its id, and how many images have it from `old`.

    A patient of `old` keeps the split there, and so does an image with the very same pixels. Other patients are drawn
    by the fractions and the seed of `config`. Raises `DataError` that names every patient who would have to be in two.
    """
    of_patient = {sample.patient: sample.split for sample in old.dataset.samples}
    of_pixels = {
        item.pixels: sample.split for sample, item in zip(old.dataset.samples, old.scanned, strict=True) if item.pixels
    }
    samples, pixels = new.dataset.samples, [item.pixels for item in new.scanned]
    groups = together([sample.patient for sample in samples], pixels)
    kept: dict[str, set[str]] = defaultdict(set)
    for group, sample, digest in zip(groups, samples, pixels, strict=True):
        for split in (of_patient.get(sample.patient), of_pixels.get(digest)):
            if split is not None:
                kept[group].add(split)
    torn = [f"{group}: {' and '.join(sorted(splits))}" for group, splits in kept.items() if len(splits) > 1]
    if torn:
        raise DataError(f"patients of {new.dataset.root} are in two splits of {old.dataset.root}", torn)
    fresh = [index for index, group in enumerate(groups) if group not in kept]
    shares = [foreground_share(new.scanned[index].codes, new.dataset.coding) for index in fresh]
    drawn = assign(
        [groups[index] for index in fresh],
        shares,
        val=config.val_fraction,
        test=config.test_fraction,
        seed=config.split_seed,
    )
    chosen = drawn | {group: next(iter(splits)) for group, splits in kept.items()}
    return {sample.id: chosen[group] for sample, group in zip(samples, groups, strict=True)}, len(samples) - len(fresh)


if __name__ == "__main__":
    cli.run(main)
