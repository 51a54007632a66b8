"""`python -m pdrunet_jax.data`: makes and checks a dataset folder."""

import csv
import io
import posixpath
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from pdrunet_jax import cli, config_io
from pdrunet_jax.config import Config, DataConfig
from pdrunet_jax.data.commands_import import ImportLabelme, ImportMura, described, import_labelme, import_mura
from pdrunet_jax.data.dataset import Inspection, inspect_dataset
from pdrunet_jax.data.layouts import MANIFEST, read_manifest
from pdrunet_jax.data.partition import split_counts
from pdrunet_jax.data.scan import class_shares
from pdrunet_jax.errors import UserError
from pdrunet_jax.files import atomic_write


@dataclass(frozen=True)
class _Folder:
    root: tyro.conf.Positional[Path]
    """Dataset folder."""
    classes: dict[str, int | str] = field(default_factory=dict)
    """Class names with their grey value, palette index or #rrggbb colour; overrides dataset.toml."""
    ignore: int | str | None = None
    """Mask value or colour that is left out of loss and metrics."""
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


@dataclass(frozen=True)
class Split(_Folder):
    """Write a patient-disjoint split into the folder's manifest.csv, making that if there is none."""


@dataclass(frozen=True)
class Phantom:
    """Draw synthetic X-rays of long bones with exact masks."""

    root: tyro.conf.Positional[Path]
    """Folder to write; it must not exist, or be empty."""
    count: int = 120
    """Images."""
    seed: int = 0
    """Seed of all that is random in them."""
    size: int = 256
    """Height and width in pixels."""


def check(options: Check) -> None:
    """Print counts, sizes, modes, classes, patients, splits and notes. Raises `DataError` with every problem."""
    print("\n".join(_report(inspect_dataset(options.config()))))


def split(options: Split) -> None:
    """Add the split to the manifest. Raises `UserError` if one is declared already."""
    inspection = inspect_dataset(options.config())
    root, samples = options.root, inspection.dataset.samples
    path = root / MANIFEST
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
    atomic_write(path, text.getvalue())
    print(f"{path}: {split_counts(samples)}")


def phantom(options: Phantom) -> None:
    """Write phantoms. Raises `UserError` if something is there."""
    if options.root.exists() and not (options.root.is_dir() and not any(options.root.iterdir())):
        raise UserError(f"{options.root} exists; name a new folder")
    from pdrunet_jax.data.phantom import write_dataset

    write_dataset(options.root, options.count, options.seed, options.size)
    print(f"{options.root}: {options.count} images of {options.size}x{options.size} pixels")


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


def _report(inspection: Inspection) -> list[str]:
    dataset, scanned = inspection.dataset, inspection.scanned
    heights, widths = zip(*(item.size for item in scanned), strict=True)
    shares = [class_shares(item.codes, dataset.coding) for item in scanned]
    means = [sum(column) / len(shares) for column in zip(*shares, strict=True)]
    ignored = sum(bool(item.codes.keys() & set(dataset.coding.ignore)) for item in scanned)
    modes = Counter(item.mode for item in scanned)
    return [
        f"{dataset.name} at {dataset.root} ({inspection.layout})",
        f"images    {len(scanned)}, {min(widths)} to {max(widths)} pixels wide, {min(heights)} to {max(heights)} high",
        f"modes     {', '.join(f'{count} {mode}' for mode, count in modes.most_common())}",
        *(
            f"class {index}   {name}: {share:.1%} of the pixels, in {sum(row[index] > 0 for row in shares)} masks"
            for index, (name, share) in enumerate(zip(("background", *dataset.class_names), means, strict=True))
        ),
        f"patients  {len({sample.patient for sample in dataset.samples})}",
        *([f"ignored   {ignored} masks have pixels that are left out"] if ignored else []),
        *(f"note      {note}" for note in dataset.notes),
    ]


if __name__ == "__main__":
    cli.run(main)
