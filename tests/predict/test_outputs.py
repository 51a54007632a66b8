"""What other programs read of a prediction: ITK and 3D Slicer, LabelMe, NumPy, tables."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pdrunet_jax.data.images import read_image
from pdrunet_jax.predict.__main__ import main
from pdrunet_jax.predict.medical import Geometry, nrrd_file
from pdrunet_jax.predict.outputs import WrittenFiles
from tests.support.tiny import bright_square, brightness_model, save_image, save_model

SQUARE = bright_square(40, 60, 12, 20, 15)
CR, DX, CT, SC = (f"1.2.840.10008.5.1.4.1.1.{number}" for number in ("1", "1.1", "2", "7"))
PLACE = {"ImagePositionPatient": [1, -2, 30.5], "ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}
TILTED = {"ImagePositionPatient": [5, 6, 7], "ImageOrientationPatient": [0.8, 0.6, 0, -0.6, 0.8, 0]}


@pytest.fixture
def weights(tmp_path):
    return save_model(brightness_model(), tmp_path / "w.safetensors", class_names=["bone"])


def segment(path, weights, *options):
    output = path.parent / "out"
    main([str(path), "--weights", str(weights), "--output", str(output), "--no-overlay", *options])
    return output


def save_dicom(path, sop_class, pixels=SQUARE, **elements):
    pydicom = pytest.importorskip("pydicom")
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = sop_class, "1.2.3.4"
    dataset = pydicom.dataset.FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
    dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class, "1.2.3.4"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    for name, value in elements.items():
        setattr(dataset, name, value)
    dataset.PixelData = (pixels.astype("<u2") * 16).tobytes()
    dataset.save_as(path, enforce_file_format=True)
    return path


def read_by_itk(path):
    """As 3D Slicer does: a volume of one slice."""
    itk = pytest.importorskip("SimpleITK")
    reader = itk.ImageSeriesReader()
    reader.SetFileNames([str(path)])
    itk.ProcessObject.SetGlobalWarningDisplay(False)
    return reader.Execute() if path.suffix not in (".nrrd", ".gz") else itk.ReadImage(str(path))


def assert_lies_over(segmentation, image):
    """Same pixels in the same place, and the square where the image is bright."""
    itk = pytest.importorskip("SimpleITK")
    found, expected = read_by_itk(segmentation), read_by_itk(image)
    assert found.GetSize() == expected.GetSize()
    for one, other in (
        (found.GetSpacing(), expected.GetSpacing()),
        (found.GetOrigin(), expected.GetOrigin()),
        (found.GetDirection(), expected.GetDirection()),
    ):
        np.testing.assert_allclose(one, other, atol=1e-6)
    pixels = itk.GetArrayFromImage(expected).reshape(*found.GetSize()[::-1], -1)[..., 0]  # ITK has BMP in colour
    np.testing.assert_array_equal(itk.GetArrayFromImage(found), pixels > (pixels.max() + pixels.min()) / 2)


@pytest.mark.parametrize(
    ("sop_class", "elements"),
    [
        (CR, {}),
        (CR, {"ImagerPixelSpacing": [0.4, 0.5]}),
        (CR, {"PixelSpacing": [0.2, 0.3]}),
        (DX, {"PixelSpacing": [0.2, 0.3], "ImagerPixelSpacing": [0.4, 0.5], **PLACE}),
        (DX, {"ImagerPixelSpacing": [0.4, 0.5], "SliceThickness": "5", **TILTED}),
        (DX, {"PixelSpacing": [0.2, 0.3], "ImageOrientationPatient": PLACE["ImageOrientationPatient"]}),
        (CT, {"PixelSpacing": [0.2, 0.3], "SpacingBetweenSlices": "4", **PLACE}),
        (CT, {"PixelSpacing": [0.2, 0.3], "ImagerPixelSpacing": [0.4, 0.5], "SliceThickness": "5", **TILTED}),
        (SC, {"PixelSpacing": [0.2, 0.3]}),
        (SC, {"NominalScannedPixelSpacing": [0.6, 0.7]}),
    ],
)
def test_a_segmentation_lies_over_its_dicom_file_as_itk_reads_both(tmp_path, weights, sop_class, elements):
    image = save_dicom(tmp_path / "x.dcm", sop_class, **elements)
    output = segment(image, weights, "--nrrd", "--nifti")
    assert_lies_over(output / "x_mask.seg.nrrd", image)
    assert_lies_over(output / "x_mask.nii.gz", image)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("x.png", {}),
        ("x.png", {"dpi": (300, 300)}),
        ("x.bmp", {"dpi": (300, 300)}),
        ("x.jpg", {}),
        ("x.jpg", {"dpi": (300, 150)}),
        ("x.tif", {"dpi": (254, 127)}),
        *((name, {"exif": turned}) for name in ("x.jpg", "x.png") for turned in range(2, 9)),
    ],
)
def test_a_segmentation_lies_over_its_picture_as_itk_reads_both(tmp_path, weights, name, how):
    image = Image.fromarray(SQUARE)
    if "exif" in how:
        exif = image.getexif()
        exif[0x0112] = how["exif"]
        how = {"exif": exif}
    image.save(tmp_path / name, **how, **({"quality": 100} if name == "x.jpg" else {}))
    output = segment(tmp_path / name, weights, "--nrrd", "--nifti")
    assert_lies_over(output / "x_mask.seg.nrrd", tmp_path / name)
    assert_lies_over(output / "x_mask.nii.gz", tmp_path / name)


def test_nifti_has_each_pixel_where_dicom_has_it_with_x_and_y_the_other_way_round(tmp_path, weights):
    nibabel = pytest.importorskip("nibabel")
    image = save_dicom(tmp_path / "x.dcm", DX, ImagerPixelSpacing=[0.4, 0.5], **TILTED)
    found = nibabel.load(segment(image, weights, "--nifti") / "x_mask.nii.gz")
    np.testing.assert_array_equal(np.asarray(found.dataobj)[:, :, 0].T, SQUARE > 128)
    assert found.header.get_xyzt_units()[0] == "mm"
    column, row = 13, 7
    x, y, z = 5 + 0.8 * 0.5 * column - 0.6 * 0.4 * row, 6 + 0.6 * 0.5 * column + 0.8 * 0.4 * row, 7
    for affine, code in (found.get_sform(coded=True), found.get_qform(coded=True)):
        assert code == 1  # the scanner's coordinates
        np.testing.assert_allclose(affine @ [column, row, 0, 1], [-x, -y, z, 1], rtol=1e-6)


def test_a_segmentation_names_its_segments_as_slicer_reads_them(tmp_path):
    nrrd = pytest.importorskip("nrrd")
    weights = save_model(brightness_model(3), tmp_path / "w.safetensors", class_names=["femur", "tibia"])
    image = save_image(tmp_path / "x.png", np.repeat([[20, 120, 230]], 30, axis=0).repeat(10, axis=1))
    voxels, header = nrrd.read(str(segment(image, weights, "--nrrd") / "x_mask.seg.nrrd"))
    assert voxels.shape == (30, 30, 1)
    assert (voxels[:, 0, 0] == np.repeat([0, 1, 2], 10)).all()
    assert header["space"] == "left-posterior-superior"
    for number, label in enumerate(("femur", "tibia")):
        assert header[f"Segment{number}_Name"] == label
        assert header[f"Segment{number}_LabelValue"] == str(number + 1)
        assert header[f"Segment{number}_Layer"] == "0"
        assert len(header[f"Segment{number}_Color"].split()) == 3
    assert header["Segment0_Color"] != header["Segment1_Color"]


def test_segments_are_named_in_utf8_as_slicer_names_them(tmp_path):
    names = ("fémur", "胫骨", "{name 0}")
    content = nrrd_file(np.ones((4, 6), np.uint8), names, Geometry())
    for number, name in enumerate(names):
        assert f"\nSegment{number}_Name:={name}\n".encode() in content
    sitk = pytest.importorskip("SimpleITK")
    (tmp_path / "x.seg.nrrd").write_bytes(content)
    assert sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "x.seg.nrrd"))).shape == (1, 4, 6)


def test_areas_are_in_square_millimetres_where_the_file_states_its_spacing(tmp_path, weights):
    (tmp_path / "in").mkdir()
    save_dicom(tmp_path / "in/x.dcm", CR, PixelSpacing=[0.2, 0.3])
    save_image(tmp_path / "in/y.png", SQUARE)
    main([str(tmp_path / "in"), "--weights", str(weights), "--output", str(tmp_path / "out")])
    with (tmp_path / "out/areas.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["image"], row["class"], row["pixels"]) for row in rows] == [
        ("x.dcm", "bone", "225"),
        ("y.png", "bone", "225"),
    ]
    assert float(rows[0]["area_mm2"]) == pytest.approx(225 * 0.2 * 0.3)
    assert rows[1]["area_mm2"] == ""


@pytest.mark.parametrize("name", ["x.png", "x.dcm"])
def test_a_labelme_file_finds_an_image_that_labelme_opens(tmp_path, weights, name):
    (tmp_path / "in").mkdir()
    image = tmp_path / "in" / name
    if name == "x.dcm":
        save_dicom(image, CR)
    else:
        save_image(image, SQUARE)
    main([str(image), "--weights", str(weights), "--output", str(tmp_path / "a/out"), "--labelme"])
    content = json.loads((tmp_path / "a/out/x.json").read_text())
    shown = tmp_path / "a/out" / content["imagePath"]
    assert shown.suffix == ".png"
    assert (shown.resolve() == image) == (name == "x.png")
    difference = np.abs(read_image(shown)[..., 0].astype(float) - read_image(image)[..., 0])
    assert difference.max() <= 0.5
    assert (content["imageHeight"], content["imageWidth"]) == SQUARE.shape
    assert [shape["label"] for shape in content["shapes"]] == ["bone"]


def test_contours_are_rows_of_points_in_the_images_pixels(tmp_path, weights):
    image = save_image(tmp_path / "x.png", np.maximum(SQUARE, bright_square(40, 60, 2, 50, 5)))
    with (segment(image, weights, "--contours") / "x_contours.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["class"] for row in rows} == {"bone"}
    corners: dict[str, set[tuple[float, float]]] = {}
    for row in rows:
        corners.setdefault(row["contour"], set()).add((float(row["x"]), float(row["y"])))
    assert sorted(corners.values(), key=min) == [
        {(20.5, 12.5), (34.5, 12.5), (34.5, 26.5), (20.5, 26.5)},
        {(50.5, 2.5), (54.5, 2.5), (54.5, 6.5), (50.5, 6.5)},
    ]


def test_classes_with_similar_names_have_a_probability_file_each():
    suffixes = WrittenFiles(overlay=False, probability=True).suffixes(Path("x.png"), ["a b", "A_b"], 3)
    assert suffixes == ["_probability_1_a_b.png", "_probability_2_A_b.png"]
