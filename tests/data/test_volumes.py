"""Masks that 3D Slicer, ITK-SNAP and a PACS hold lie on their images again, however their axes were turned."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from PIL import Image

from pdrunet_jax.data.dataset import open_dataset
from pdrunet_jax.data.images import read_image
from pdrunet_jax.data.importers.volumes import ImportVolumes, import_volumes
from pdrunet_jax.data.masks import read_mask
from pdrunet_jax.data.phantoms.phantom import draw
from pdrunet_jax.predict.medical import nifti_file, nrrd_file, read_geometry
from pdrunet_jax.runtime.errors import UserError
from tests.support.dicom_seg import write_seg
from tests.support.small_data import SIZE, config, noise, save, shapes, write_dicom

NAMES = ("femur", "tibia")
OBLIQUE = [0.8, 0.6, 0, -0.6, 0.8, 0]


def imported(source: Path, **options: Any) -> dict[str, np.ndarray]:
    """Import `source`; returns class indices by the name of the image."""
    target = source.parent / "target"
    import_volumes(ImportVolumes(source, target, **options))
    dataset = open_dataset(config(target))
    return {sample.image.name: read_mask(sample.mask, dataset.coding) for sample in dataset.samples}


def refused(source: Path, **options: Any) -> str:
    target = source.parent / "refused"
    with pytest.raises(UserError) as caught:
        import_volumes(ImportVolumes(source, target, **options))
    assert not target.exists()
    return str(caught.value)


def images(folder: Path, pixels: np.ndarray) -> dict[str, Path]:
    """The same picture as files of different positions."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90)
    oblique = dict(PixelSpacing=[0.3, 0.2], ImageOrientationPatient=OBLIQUE, ImagePositionPatient=[10, -20, 30])
    return {
        "a": save(pixels, folder / "a.png"),
        "b": save(pixels, folder / "b.jpg", dpi=(150, 100)),
        "c": save(pixels, folder / "c.tif", dpi=(150, 100)),
        "d": save(turned, folder / "d.jpg", exif=exif),
        "e": write_dicom(folder / "e.dcm", pixels.astype(np.uint16), ImagerPixelSpacing=[0.15, 0.1]),
        "f": write_dicom(
            folder / "f.dcm", pixels.astype(np.uint16), SOPClassUID="1.2.840.10008.5.1.4.1.1.2", **oblique
        ),
    }


def reoriented(path: Path, orientation: str) -> None:
    """Rewrite a volume with its axes in another order and direction, where they were in space."""
    image = sitk.ReadImage(str(path))
    sitk.WriteImage(sitk.DICOMOrient(image, orientation), str(path))


@pytest.mark.parametrize("orientation", ["", "LPS", "RAI", "PIR", "SAL"])
@pytest.mark.parametrize("kind", ["nrrd", "nifti", "mha"])
def test_what_predict_wrote_and_a_viewer_rewrote_lies_on_the_image(kind: str, orientation: str, tmp_path: Path) -> None:
    phantom = draw(1, size=64)
    pixels, mask = phantom.image[:, 5:55], phantom.mask[:, 5:55].copy()
    mask[40:50, 30:] *= 2
    files = images(tmp_path / "xrays", pixels)
    for name, path in files.items():
        geometry = read_geometry(path)
        data, suffix = nifti_file(mask, geometry), ".nii.gz"
        if kind == "nrrd" and not orientation:
            data, suffix = nrrd_file(mask, NAMES, geometry), ".seg.nrrd"
        target = tmp_path / "corrected" / f"{name}_mask{suffix}"
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(data)
        if kind != "nifti" and suffix != ".seg.nrrd":  # as a viewer saves it again
            other = target.with_name(f"{name}_mask.{kind}")
            sitk.WriteImage(sitk.ReadImage(str(target)), str(other))
            target.unlink()
            target = other
        if orientation:
            reoriented(target, orientation)
    masks = imported(tmp_path / "corrected", images=tmp_path / "xrays", classes={NAMES[0]: 1, NAMES[1]: 2})
    assert masks.keys() == {path.name for path in files.values()}
    for name, found in masks.items():
        assert (found == mask).all(), name


def test_names_of_segments_are_taken_and_may_be_in_layers(tmp_path: Path) -> None:
    path = save(noise(0), tmp_path / "source" / "a.png")
    mask = shapes(0)
    (tmp_path / "source" / "a.seg.nrrd").write_bytes(nrrd_file(mask, NAMES, read_geometry(path)))
    assert (imported(tmp_path / "source")["a.png"] == mask).all()
    # Two segments that overlap are two components, and the later one counts.
    layers = np.stack([mask > 0, mask == 2], axis=-1).astype(np.uint8)
    image = sitk.GetImageFromArray(layers[None], isVector=True)
    for number, name in enumerate(NAMES):
        for key, value in {"Name": name, "LabelValue": "1", "Layer": str(number)}.items():
            image.SetMetaData(f"Segment{number}_{key}", value)
    sitk.WriteImage(image, str(tmp_path / "source" / "a.seg.nrrd"))
    (tmp_path / "target").rename(tmp_path / "first")
    assert (imported(tmp_path / "source")["a.png"] == mask).all()


def test_a_corrected_mask_beside_the_first_one_is_not_joined_with_it(tmp_path: Path) -> None:
    source, mask = tmp_path / "source", (shapes(0) > 0).astype(np.uint8)
    path = save(noise(0), source / "a.png")
    for kind in ("mask", "overlay"):
        save(mask, source / f"a_{kind}.png")
    _written(source / "a_mask_corrected.nii.gz", nifti_file(mask, read_geometry(path)))
    assert (imported(source)["a.png"] == mask).all()
    _written(source / "a_mask.nii.gz", nifti_file(mask, read_geometry(path)))
    assert "a.png: several masks: a_mask.nii.gz, a_mask_corrected.nii.gz; leave one" in refused(source)


def test_a_cropped_mask_is_put_back_and_others_are_refused_with_both_positions(tmp_path: Path) -> None:
    source = tmp_path / "source"
    path = save(noise(0), source / "images/a.png")
    mask = (shapes(0) > 0).astype(np.uint8)
    mask[:2], mask[-2:] = 0, 0
    (source / "masks").mkdir()
    whole = sitk.ReadImage(str(_written(source / "masks/a.nii.gz", nifti_file(mask, read_geometry(path)))))
    sitk.WriteImage(whole[:, 2:-2, :], str(source / "masks/a.nii.gz"))
    assert (imported(source)["a.png"] == mask).all()
    bad: dict[str, Callable[[Any], Any]] = {
        "spacing": lambda image: _changed(image, spacing=(2, 1, 1)),
        "half": lambda image: _changed(image, origin=(0.5, 0, 0)),
        "tilted": lambda image: _changed(image, direction=(0.8, -0.6, 0, 0.6, 0.8, 0, 0, 0, 1)),
        "behind": lambda image: _changed(image, origin=(0, 0, 50)),
    }
    for name, change in bad.items():
        sitk.WriteImage(change(whole), str(source / "masks/a.nii.gz"))
        message = refused(source)
        assert "masks/a.nii.gz: " in message, name
        assert "Mask: 24x20x1 voxels of" in message
        assert "Image: 24x20x1 voxels of 1x1x1 mm, first at (0, 0, 0), axes (1, 0, 0) (0, 1, 0) (0, 0, 1)" in message
    sitk.WriteImage(_changed(whole, origin=(5, 0, 0)), str(source / "masks/a.nii.gz"))
    assert "parts of it lie outside" in refused(source)
    (tmp_path / "target").rename(tmp_path / "first")
    assert (imported(source, geometry="ignore")["a.png"] == mask).all()


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _changed(
    image: Any,
    spacing: Sequence[float] | None = None,
    origin: Sequence[float] | None = None,
    direction: Sequence[float] | None = None,
) -> Any:
    image = sitk.Image(image)
    if spacing:
        image.SetSpacing(spacing)
    if origin:
        image.SetOrigin(origin)
    if direction:
        image.SetDirection(direction)
    return image


def test_images_may_be_volumes_too_and_keep_their_values(tmp_path: Path) -> None:
    source = tmp_path / "source"
    kinds: Mapping[str, np.ndarray] = {
        "byte": noise(0),
        "word": noise(0).astype(np.uint16) * 200,
        "float": noise(0).astype(np.float32) / 7 - 3,
    }
    (source / "imagesTr").mkdir(parents=True)
    (source / "labelsTr").mkdir()
    for name, pixels in kinds.items():
        image = sitk.GetImageFromArray(pixels[None])
        image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
        sitk.WriteImage(image, str(source / f"imagesTr/{name}_0000.nii.gz"))
        mask = sitk.GetImageFromArray(shapes(1)[None])
        mask.CopyInformation(image)
        sitk.WriteImage(sitk.DICOMOrient(mask, "LPS"), str(source / f"labelsTr/{name}.nii.gz"))
    (source / "dataset.json").write_text('{"labels": {"background": 0, "femur": 1, "tibia": 2}}')
    masks = imported(source)
    assert masks.keys() == {"byte_0000.png", "word_0000.png", "float_0000.tif"}
    assert all((mask == shapes(1)).all() for mask in masks.values())
    folder = tmp_path / "target/images/imagesTr"
    assert (read_image(folder / "byte_0000.png")[:, :, 0] == noise(0)).all()
    assert (np.array(Image.open(folder / "word_0000.png")) == kinds["word"]).all()
    assert (np.array(Image.open(folder / "float_0000.tif")) == kinds["float"]).all()
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((2, *SIZE), np.uint8)), str(source / "labelsTr/byte.nii.gz"))
    assert "24x20x2 voxels; only single slices" in refused(source)


def test_pixels_in_another_file_are_taken_only_from_beside(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save(noise(0), source / "images/a.png")
    (source / "masks").mkdir()
    mask = (shapes(0) > 0).astype(np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(mask), str(source / "masks/a.mhd"))
    assert (imported(source)["a.png"] == mask).all()
    secret = _written(tmp_path / "secret.raw", mask.tobytes())
    header = (source / "masks/a.mhd").read_text()
    for place in (str(secret), "../../secret.raw", "LIST"):
        (source / "masks/a.mhd").write_text(header.replace("a.zraw", place).replace("a.raw", place))
        assert "its pixels are in another file" in refused(source)
    (source / "masks/a.raw").unlink()
    (source / "masks/a.raw").symlink_to(secret)
    (source / "masks/a.mhd").write_text(header)
    assert "out of the folder" in refused(source)
    (source / "masks/a.mhd").unlink()
    text = f"NRRD0004\ntype: uint8\ndimension: 2\nsizes: 24 20\nencoding: raw\ndata file: {secret}\n\n"
    (source / "masks/a.nrrd").write_text(text)
    assert "its pixels are in another file" in refused(source)


def test_a_dicom_segmentation_lies_on_the_image_it_refers_to(tmp_path: Path) -> None:
    source, mask = tmp_path / "source", shapes(0)
    source.mkdir()
    paths = [
        write_dicom(source / f"i{i}.dcm", noise(i).astype(np.uint16), SOPInstanceUID=f"1.2.{i + 1}") for i in (0, 1)
    ]
    frames = np.stack([mask == 2, mask == 1])  # frames are in the reverse order of segments
    write_seg(source / "anything.dcm", frames, NAMES, "1.2.2")
    masks = imported(source)
    assert masks.keys() == {paths[1].name}
    assert (masks["i1.dcm"] == mask).all()
    write_seg(source / "anything.dcm", frames, NAMES, "1.2.9")
    assert "anything.dcm: a mask without an image" in refused(source)
    write_seg(source / "anything.dcm", frames[:, :-1], NAMES, "1.2.2")
    assert "was drawn on 24x19 pixels, not 24x20" in refused(source)
    write_seg(source / "anything.dcm", frames, NAMES, "1.2.2", NumberOfFrames=10**9)
    assert "anything.dcm: the number of its frames" in refused(source)


def test_dicom_images_may_be_masks(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for folder in ("images", "masks"):
        (source / folder).mkdir(parents=True)
    write_dicom(source / "images/a.dcm", noise(0).astype(np.uint16))
    write_dicom(source / "masks/a.dcm", shapes(0).astype(np.uint16))
    assert "it has the values 1, 2; name them" in refused(source)
    assert (imported(source, classes={"femur": 1, "tibia": 2})["a.dcm"] == shapes(0)).all()
