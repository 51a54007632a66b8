"""Import COUNT damaged exports of each tool: `python -m tests.support.fuzz_importers COUNT SEED`."""

import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813

from pdrunet_jax.data.__main__ import IMPORTERS
from tests.support import foreign
from tests.support.dicom_seg import write_seg
from tests.support.fuzz import Kinds, damaged, run, texts
from tests.support.small_data import noise, save, shapes, write_dicom

MOST_BYTES = 1 << 30


def kinds(folder: Path) -> Kinds:
    """The files of each tool that a person brings."""
    masks = {"a": shapes(0)}

    def imports(command: str, file: str, folder_of_image: str = "", **options: Any) -> Callable[[bytes], object]:
        source = folder / f"{command} {file.replace('/', ' ')}"
        save(noise(0), source / folder_of_image / "a.png")
        (source / file).parent.mkdir(parents=True, exist_ok=True)

        def read(data: bytes) -> None:
            (source / file).write_bytes(data)
            kind, _, function = IMPORTERS[command]
            with tempfile.TemporaryDirectory(dir=folder) as target:
                function(kind(source, Path(target) / "x", **options))

        return read

    def text(path: Path) -> str:
        return path.read_text(encoding="utf-8")

    good = folder / "good"
    coco = [text(foreign.coco(good / f"{kind}.json", masks, kind)) for kind in ("polygon", "counts", "compressed")]
    studio = [text(foreign.label_studio(good / f"{kind}.json", masks, kind)) for kind in ("brush", "polygon", "min")]
    supervisely = text(foreign.supervisely(good / "ann", masks) / "a.png.json")
    cvat = text(foreign.cvat(good / "cvat.xml", masks))
    points = "".join(f"<pt><x>{x}</x><y>{y}</y></pt>" for x, y in ((1, 1), (9, 1), (9, 9)))
    xml = f"<annotation><filename>a.png</filename><object><name>femur</name><polygon>{points}</polygon></object>"
    voc = imports("import-voc", "labelmap.txt", "JPEGImages")
    foreign.voc(folder / "import-voc labelmap.txt", masks, labelmap=True)
    classes = imports("import-masks", "_classes.csv", "images")
    save(shapes(0), folder / "import-masks _classes.csv" / "masks" / "a.png")

    volumes = []
    for suffix in ("nrrd", "nii", "nii.gz", "mha"):
        image = sitk.GetImageFromArray(shapes(0)[None])
        if suffix == "nrrd":
            image.SetMetaData("Segment0_Name", "femur")
        sitk.WriteImage(image, str(good / f"a.{suffix}"), useCompression=suffix != "nii")
        volumes.append((suffix, (good / f"a.{suffix}").read_bytes()))
    dicom = imports("import-volumes", "seg.dcm")
    shutil.rmtree(folder / "import-volumes seg.dcm")
    (folder / "import-volumes seg.dcm").mkdir()
    write_dicom(folder / "import-volumes seg.dcm" / "i.dcm", noise(0).astype(np.uint16))
    seg = write_seg(good / "seg.dcm", np.stack([shapes(0) == 1, shapes(0) == 2]), foreign.NAMES, "1.2.3")
    numbers = {"classes": {"femur": 1, "tibia": 2}}
    return {
        "coco": (texts(*coco), imports("import-coco", "a.json")),
        "label studio": (texts(*studio), imports("import-label-studio", "a.json")),
        "supervisely": (texts(supervisely), imports("import-supervisely", "ann/a.png.json", "img")),
        "cvat": (texts(cvat), imports("import-cvat", "a.xml")),
        "labelme xml": (texts(xml + "</annotation>"), imports("import-labelme", "a.xml")),
        "labelmap": (texts(text(folder / "import-voc labelmap.txt" / "labelmap.txt")), voc),
        "classes": (texts("Pixel Value, Class\n0, background\n1, femur\n2, tibia\n"), classes),
        **{
            suffix: (damaged([data]), imports("import-volumes", f"masks/a.{suffix}", "images", **numbers))
            for suffix, data in volumes
        },
        "dicom seg": (damaged([seg.read_bytes()]), dicom),
    }


if __name__ == "__main__":
    run(int(sys.argv[1]), int(sys.argv[2]), kinds, MOST_BYTES)
