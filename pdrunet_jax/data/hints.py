"""What a folder seems to be that is not a dataset folder: the importer that reads it, or the folder to name instead."""

import re
from collections.abc import Sequence

_EXPORTS = (
    (r"(^|/)SegmentationClass(PNG)?/", "import-voc"),
    (r"(^|/)task-\d+-annotation-\d+-", "import-label-studio"),
    (r"\.coco\.json$|(^|/)instances_[^/]*\.json$", "import-coco"),
    (r"(^|/)annotations\.xml$", "import-cvat"),
    (r"(^|/)ann/[^/]+\.json$", "import-supervisely"),
    (r"\.(nrrd|nii|nii\.gz|mha|mhd)$", "import-volumes"),
    (r"\.json$", "import-labelme, import-coco or import-label-studio"),
    (r"\.xml$", "import-labelme"),
    (r"(mask|label|seg|gt).*\.(png|jpe?g|tiff?|bmp|gif)$", "import-masks"),
)
"""Paths that tell an export, the surest first, and the importers that read it."""
_CLASS_FOLDER = re.compile(r"mask[^/]*/[^/]+/[^/]+$", re.I)
_PAIR = re.compile(r"(.+?)/(images|imagesTr|(train|training)/images)/[^/]+$", re.I)


def importer_of(names: Sequence[str]) -> str | None:
    """The importers that may read a folder with files of these POSIX paths; None if nothing tells."""
    return next((name for form, name in _EXPORTS if any(re.search(form, path, re.I) for path in names)), None)


def hint(names: Sequence[str]) -> str:
    """What to do with a folder that holds files of these POSIX paths, but no dataset; empty if nothing tells."""
    inner = {match[1] for name in names if (match := _PAIR.match(name))}
    if len(inner) == 1:
        return f"The dataset seems to be in {inner.pop()}/: name that folder."
    if (importer := importer_of(names)) is None:
        return ""
    by_class = importer == "import-masks" and any(_CLASS_FOLDER.search(name) for name in names)
    overlap = "; data.multilabel = true reads one mask file for each class" if by_class else ""
    command = f"python -m pdrunet_jax.data {importer.split(',')[0]} --help"
    return f"This may be an export to read by {importer} ({command}){overlap}."
