"""The subcommands that make other people's annotations a dataset folder."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pdrunet_jax.errors import UserError

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
    from pdrunet_jax.data import labelme

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
    from pdrunet_jax.data import mura

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
