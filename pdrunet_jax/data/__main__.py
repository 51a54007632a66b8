"""`python -m pdrunet_jax.data`: makes and checks a dataset folder."""

import csv
import io
import posixpath
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tyro

from pdrunet_jax import cli, config_io
from pdrunet_jax.config import Config, DataConfig
from pdrunet_jax.data.commands_import import ImportLabelme, ImportMura, described, import_labelme, import_mura
from pdrunet_jax.data.dataset import inspect_dataset
from pdrunet_jax.data.layouts import MANIFEST, read_manifest
from pdrunet_jax.data.partition import split_counts
from pdrunet_jax.data.phantom_files import Drawing, write_phantoms
from pdrunet_jax.data.summary import report_lines
from pdrunet_jax.errors import UserError
from pdrunet_jax.files import atomic_write, writing


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
class Phantom(Drawing):
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
        from pdrunet_jax.data.continued import continue_split

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


if __name__ == "__main__":
    cli.run(main)
