"""Command `python -m pdrunet_jax.data`: import, check and split datasets; draw synthetic X-rays."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tyro

from pdrunet_jax.config import Config, DataConfig
from pdrunet_jax.config import check as check_config
from pdrunet_jax.data.contact_sheet import write_check
from pdrunet_jax.data.dataset import continue_split, inspect_dataset, report_lines
from pdrunet_jax.data.importers import coco, cvat, label_studio, labelme, masks, mura, supervisely, voc, volumes
from pdrunet_jax.data.manifest import MANIFEST, normal_path, read_manifest, write_manifest
from pdrunet_jax.data.phantoms.files import write_phantoms
from pdrunet_jax.data.phantoms.surfaces.files import SurfaceOptions, write_xrays
from pdrunet_jax.data.phantoms.surfaces.views import VIEWS
from pdrunet_jax.data.selection import HELP, Next, choose_next
from pdrunet_jax.data.split import manifest_rows, split_counts
from pdrunet_jax.runtime import cli
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.files import is_present, writing

IMPORTERS: dict[str, tuple[Any, str, Callable[[Any], list[str]]]] = {
    "import-labelme": (labelme.ImportLabelme, labelme.HELP, labelme.import_labelme),
    "import-coco": (coco.ImportCoco, coco.HELP, coco.import_coco),
    "import-cvat": (cvat.ImportCvat, cvat.HELP, cvat.import_cvat),
    "import-voc": (voc.ImportVoc, voc.HELP, voc.import_voc),
    "import-label-studio": (
        label_studio.ImportLabelStudio,
        label_studio.HELP,
        label_studio.import_label_studio,
    ),
    "import-supervisely": (supervisely.ImportSupervisely, supervisely.HELP, supervisely.import_supervisely),
    "import-masks": (masks.ImportMasks, masks.HELP, masks.import_masks),
    "import-volumes": (volumes.ImportVolumes, volumes.HELP, volumes.import_volumes),
    "import-mura": (mura.ImportMura, mura.HELP, mura.import_mura),
}
"""Options, help text and function of each importer."""


@dataclass(frozen=True)
class _Folder(DataConfig):
    """The settings of training that decide what a dataset folder holds."""

    root: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")] = tyro.MISSING
    """Dataset folder."""
    # Nothing is resized or kept, and phantoms have a subcommand of their own.
    size: tyro.conf.Suppress[tuple[int, ...]] = (256,)
    fit: tyro.conf.Suppress[Literal["stretch", "pad"]] = "stretch"
    spacing: tyro.conf.Suppress[float | None] = None
    cache: tyro.conf.Suppress[Literal["none"]] = "none"
    fold: tyro.conf.Suppress[str | None] = None
    phantoms: tyro.conf.Suppress[int] = 0
    surfaces: tyro.conf.Suppress[str | None] = None

    def config(self) -> DataConfig:
        """These options as checked settings. Raises `UserError`."""
        data = DataConfig(**{field.name: getattr(self, field.name) for field in fields(DataConfig)})
        return check_config(Config(data=data), "the command line").data


@dataclass(frozen=True)
class Check(_Folder):
    """Read every file; report counts, sizes, classes and splits, or all problems at once."""

    size: tuple[int, ...] = (256,)
    """Height and width that training will resize images to; one number sets both. The check says what that squeezes."""
    output: Path | None = None
    """Folder for check.html (the report) and contact_sheet.png (images with their masks)."""
    pictures: int = 24
    """Images on the contact sheet, from the least foreground to the most."""


@dataclass(frozen=True)
class Split(_Folder):
    """Write a patient-disjoint split into manifest.csv, which is created if necessary."""

    keep: Path | None = None
    """Earlier version of the dataset: its patients keep their split, and only new patients are drawn."""


@dataclass(frozen=True)
class Phantom(SurfaceOptions):
    """Draw synthetic X-rays of bones with exact masks, of made-up limbs or from bone surfaces."""

    root: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")] = tyro.MISSING
    """Folder to write; must be empty or not exist."""


def check(options: Check) -> None:
    """Print the report of a dataset folder. Raises `DataError` with every problem."""
    if options.pictures < 1:
        raise UserError(f"--pictures {options.pictures}: a contact sheet needs at least one image")
    inspection = inspect_dataset(options.config())
    lines = report_lines(inspection)
    print(cli.printable("\n".join(lines)))
    if options.output is None:
        print("pictures  add --output FOLDER to see masks over images")
        return
    print(f"pictures  {write_check(options.output, inspection, lines, options.pictures)}")


def split(options: Split) -> None:
    """Add the split to the manifest. Raises `UserError` if it has one already."""
    config = options.config()
    inspection = inspect_dataset(config)
    root, samples = Path(options.root), inspection.dataset.samples
    path = root / MANIFEST
    if any(sample.layers for sample in samples):
        raise UserError(
            f"{root} has one mask file a class, and a manifest lists one an image: put images and masks into train/, "
            "val/ and test/ instead"
        )
    if options.keep is not None:
        earlier = inspect_dataset(replace(config, root=str(options.keep)))
        splits, kept = continue_split(inspection, earlier, config)
        samples = tuple(replace(sample, split=splits[sample.id]) for sample in samples)
        print(f"{kept} of {len(samples)} images have the split of their patient in {options.keep}")
    if is_present(path):
        manifest = read_manifest(root)
        if "split" in manifest.columns:
            raise UserError(f"{path} has a split; remove that column to draw another")
        splits = {sample.id: sample.split for sample in samples}
        rows = [{**row, "split": splits[normal_path(row["image"])]} for row in manifest.rows]
    else:
        rows = manifest_rows(root, samples)
    with writing(path):
        write_manifest(root, rows)
    print(f"{path}: {split_counts(samples)}")


def phantom(options: Phantom) -> None:
    """Write phantoms, or X-rays drawn from surfaces. Raises `UserError` if the folder is not empty."""
    if options.surfaces is not None:
        notes = write_xrays(options.root, options)
        print(cli.printable("\n".join(notes)))
        print(f"{options.root}: {options.count} images with a longest side of {options.size} pixels")
        return
    if options.layers or options.without or options.views != VIEWS:
        raise UserError("--layers, --views and --without need --surfaces FOLDER: phantoms have none of them")
    write_phantoms(options.root, options)
    print(f"{options.root}: {options.count} images of {options.size}x{options.size} pixels")


def main() -> None:
    """Run the subcommand on the command line."""
    importers = [_described(options, name, text) for name, (options, text, _) in IMPORTERS.items()]
    commands: Any = Union[(Check, Split, *importers, _described(Next, "next", HELP), Phantom)]
    description = "Import, check and split datasets, choose what to annotate next, or draw synthetic X-rays."
    options = tyro.cli(commands, prog=cli.program("data"), description=description)
    if isinstance(options, Check):
        check(options)
    elif isinstance(options, Split):
        split(options)
    elif isinstance(options, Next):
        choose_next(options)
    elif isinstance(options, Phantom):
        phantom(options)
    else:
        run_import = next(function for kind, _, function in IMPORTERS.values() if isinstance(options, kind))
        try:
            notes = run_import(options)
        except OSError as error:
            raise UserError(f"{error.filename}: {error.strerror or error}") from None
        print(cli.printable("\n".join([*notes, f"written to {options.dst}"])))


def _described(options: type, name: str, text: str) -> Any:
    """`options` with a long help text, unless the list of subcommands is shown, which has one line for each."""
    return Annotated[options, tyro.conf.subcommand(name, description=text)] if name in sys.argv[1:2] else options


if __name__ == "__main__":
    cli.run(main)
