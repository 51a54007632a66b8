"""Classes that overlap, from mask files to scores and files of predictions."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from pdrunet_jax import config as config_io
from pdrunet_jax.config import AugmentConfig, DataConfig, LossConfig
from pdrunet_jax.data.__main__ import Split, split
from pdrunet_jax.data.augment import augment, sample_keys
from pdrunet_jax.data.dataset import Dataset, open_dataset, report_lines
from pdrunet_jax.data.dataset import inspect_dataset as inspect
from pdrunet_jax.data.layers import declared_layers, read_truth
from pdrunet_jax.data.masks import IGNORE, PADDING, declare
from pdrunet_jax.data.overlay import difference
from pdrunet_jax.data.pipeline import eval_batches, train_batches
from pdrunet_jax.evaluate import scores
from pdrunet_jax.evaluate.__main__ import main as evaluate
from pdrunet_jax.evaluate.scores import ScoringOptions
from pdrunet_jax.export.__main__ import ExportOptions, export
from pdrunet_jax.model.load import load_model
from pdrunet_jax.predict.__main__ import main as predict
from pdrunet_jax.runtime.errors import DataError, UserError
from pdrunet_jax.train.final import choose_threshold, weights_options
from pdrunet_jax.train.losses import make_loss
from pdrunet_jax.train.step import build_model, create_state, make_eval_step, make_train_step
from tests.support.overlapping import CLASSES, drawn, save_overlapping
from tests.support.tiny import brightness_model, run_command, save_model

FORMS = ("folders", "suffixes", "bits", "colours")


def settings(root: Path, **options: object) -> DataConfig:
    return DataConfig(**{"root": str(root), "size": (32,), "multilabel": True, "threads": 1, **options})  # type: ignore[arg-type]


def number_of(sample_id: str) -> int:
    return int(Path(sample_id).stem[1:])


@pytest.fixture
def opened(tmp_path: Path) -> tuple[Dataset, DataConfig]:
    config = settings(save_overlapping(tmp_path / "data", "bits"))
    return open_dataset(config), config


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_layers_that_were_drawn(tmp_path: Path, form: str) -> None:
    config = settings(save_overlapping(tmp_path, form))
    inspection = inspect(config)
    dataset = inspection.dataset
    assert dataset.class_names == CLASSES
    assert dataset.outputs == 2
    for sample in dataset.samples:
        np.testing.assert_array_equal(read_truth(sample, dataset.coding), drawn(number_of(sample.id))[1])
    shares = drawn(0)[1].mean(axis=(0, 1))
    assert any(f"bone: {shares[0]:.1%} of the pixels" in line for line in report_lines(inspection))
    batches = []
    for cache in ("memory", "none"):
        again = replace(config, cache=cache)
        batches += eval_batches(open_dataset(again), "all", again, batch_size=16, channels=1)
    np.testing.assert_array_equal(batches[0]["mask"], batches[1]["mask"])
    assert batches[0]["mask"].shape == (16, 32, 32, 2)
    assert (batches[0]["mask"][12:] == IGNORE).all()


@pytest.mark.parametrize(
    ("image", "mask", "splits"),
    [
        ("Images/{0}", "Labels/{1}/{0}", None),
        ("{2}/imgs/{0}", "{2}/masks/{1}/{0}", ("train2017", "dev")),
        ("images/{2}/{0}", "masks/{2}/{1}/MASK_{0}", ("Train", "test")),
    ],
)
def test_files_of_each_class_are_found_in_every_layout(
    tmp_path: Path, image: str, mask: str, splits: tuple[str, str] | None
) -> None:
    """Folders with other names, splits, litter, and words in the names of masks, as for one mask file an image."""
    save_overlapping(tmp_path / "old", "folders", 4)
    for path in list((tmp_path / "old").rglob("*.png")):
        form = image if path.parent.name == "images" else mask
        part = splits[int(path.stem[1:]) % 2] if splits else ""
        new = tmp_path / "new" / form.format(path.name, path.parent.name, part)
        new.parent.mkdir(parents=True, exist_ok=True)
        path.rename(new)
    litter = tmp_path / "new" / Path(mask.format("x", "bone", splits[0] if splits else "")).parent / "@eaDir/x0.png"
    litter.parent.mkdir(parents=True)
    litter.write_bytes(b"x")
    dataset = open_dataset(settings(tmp_path / "new"))
    assert (dataset.class_names, len(dataset.samples)) == (CLASSES, 4)
    if splits:
        found = {sample.split for sample in dataset.samples}
        assert found == {"train", "val"} if splits[1] == "dev" else found >= {"train", "test"}
    for sample in dataset.samples:
        np.testing.assert_array_equal(read_truth(sample, dataset.coding), drawn(number_of(sample.id))[1])


def test_undeclared_values_name_the_mask_file(opened: tuple[Dataset, DataConfig]) -> None:
    sample = opened[0].samples[0]
    coding = declared_layers(declare({"a": 1, "b": [1, 2]}, overlap=True), ("a", "b"), files=False)
    with pytest.raises(UserError, match=f"{sample.mask.name}: undeclared mask value"):
        read_truth(replace(sample, layers=()), coding)


def test_a_file_that_is_not_there_is_a_class_that_is_not_there(tmp_path: Path) -> None:
    root = save_overlapping(tmp_path, "folders")
    (root / "masks/implant/x3.png").unlink()
    dataset = open_dataset(settings(root))
    assert any("implant: 1 images have no mask of it" in note for note in dataset.notes)
    (sample,) = (sample for sample in dataset.samples if sample.id == "images/x3.png")
    truth = read_truth(sample, dataset.coding)
    np.testing.assert_array_equal(truth, drawn(3)[1] * np.array([1, 0], np.uint8))
    with pytest.raises(UserError, match="a manifest lists one an image"):
        split(Split(root=str(root), multilabel=True))
    # Changes of any of the files are noticed, and no file is left over.
    assert dataset.changed() == []
    (root / "masks/implant/x4.png").write_bytes((root / "masks/implant/x5.png").read_bytes())
    assert dataset.changed() == ["images/x4.png"]
    (root / "masks/bone/x3.png").rename(root / "masks/bone/other.png")
    with pytest.raises(DataError) as error:
        open_dataset(settings(root))
    assert [problem.split(":")[0] for problem in error.value.problems] == ["images/x3.png", "masks/bone/other.png"]


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    root = save_overlapping(tmp_path, "bits")
    with pytest.raises(UserError, match=r"declared 2 times.*classes that overlap need data\.multilabel"):
        open_dataset(settings(root, multilabel=False))
    with pytest.raises(UserError, match="2 to 8 classes, not 1"):
        open_dataset(settings(root, classes={"bone": "1,3"}))
    with pytest.raises(UserError, match="2 to 8 classes, not 9"):
        open_dataset(settings(root, classes={f"c{n}": n for n in range(1, 10)}))
    with pytest.raises(DataError, match="undeclared mask value"):
        open_dataset(settings(root, classes={"bone": 1, "implant": 2}))
    (root / "dataset.toml").unlink()
    with pytest.raises(UserError, match="needs classes"):
        open_dataset(settings(root))
    with pytest.raises(DataError, match="needs one class"):
        config_io.from_dict({"data": {"multilabel": True, "soft_masks": True}}, "test")
    with pytest.raises(UserError, match=r"loss\.name = ce does not fit data\.multilabel = true"):
        make_loss(LossConfig(name="ce"), 2, multilabel=True)
    with pytest.raises(UserError, match="needs 2, one a class"):
        make_loss(LossConfig(class_weights=(1, 1, 1)), 2, multilabel=True)


def test_layers_are_augmented_as_masks_of_one_class_are() -> None:
    image, layers = (np.stack(each) for each in zip(*(drawn(number) for number in range(3)), strict=True))
    pixels, layers = jnp.asarray(image[..., None] / 255, jnp.float32), jnp.asarray(layers)
    keys = sample_keys(jax.random.key(0), jnp.zeros(3), jnp.arange(3))
    run = jax.jit(augment, static_argnames=("config", "padded"))
    for config in (AugmentConfig(flip_horizontal=0.5, rotate=20, scale=0.2), AugmentConfig(flip_horizontal=0.5)):
        _, both = run(pixels, layers, keys, config, padded=True)
        for place in range(2):
            _, alone = run(pixels, layers[..., place], keys, config, padded=True)
            np.testing.assert_array_equal(both[..., place], alone)


def test_scores_are_those_of_each_class_alone() -> None:
    truth, predicted = drawn(0)[1], drawn(1)[1]
    truth[:4, :, 1] = IGNORE  # of one class only
    rows = scores.score("x", "p", predicted, truth, CLASSES, ScoringOptions())
    for place, row in enumerate(rows):
        alone = scores.score(
            "x", "p", predicted[..., place], truth[..., place], CLASSES[place : place + 1], ScoringOptions()
        )
        assert [row] == alone
    colours = {tuple(colour) for colour in difference(drawn(0)[0], truth, predicted).reshape(-1, 3)}
    assert len(colours) > 3


def test_training_learns_both_classes_where_they_overlap(opened: tuple[Dataset, DataConfig]) -> None:
    dataset, data = opened
    network = {"name": "unet", "depth": 1, "filters": 8, "dropout": 0.0}
    sections = {"model": network, "optim": {"learning_rate": 0.01}}
    config = replace(config_io.from_dict(sections, "test"), data=data)
    graphdef, state = create_state(config, build_model(config, 2))
    step, judge = make_train_step(config, graphdef, 2), make_eval_step(config, graphdef, 2)
    batches = train_batches(dataset, data, batch_size=7, channels=1, seed=0)
    for _ in range(180):
        state, _ = step(state, next(batches))
    batches.close()
    (batch,) = eval_batches(dataset, "all", data, batch_size=12, channels=1)
    result = judge(state.params, state.stats, {"image": batch["image"], "mask": batch["mask"]})
    dice = 2 * result["tp"] / (2 * result["tp"] + result["fp"] + result["fn"])
    assert dice.shape == (12, 2)
    assert dice.mean(axis=0).min() > 0.95
    both = (batch["mask"] == 1).all(axis=-1)
    assert np.asarray(result["prediction"])[both].mean() > 0.95
    stated = weights_options(config, dataset, 2)
    assert stated["multilabel"] is True


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Of a model in which whatever is above half the brightness is of both classes."""
    facts = {"size": [32], "multilabel": True, "class_names": ["bone", "implant"], "threshold": [0.4, 0.6]}
    return save_model(brightness_model(2), tmp_path / "w.safetensors", **facts)


def test_prediction_writes_bits_layers_and_tables(tmp_path: Path, weights: Path) -> None:
    nrrd = pytest.importorskip("nrrd")
    pixels = np.repeat([[20, 100, 200]], 24, axis=0).repeat(8, axis=1).astype(np.uint8)
    (tmp_path / "in").mkdir()
    Image.fromarray(pixels).save(tmp_path / "in/x.png")
    words = [str(tmp_path / "in"), "--weights", str(weights), "--output", str(tmp_path / "out"), "--size", "own"]
    extra = ["--threshold", "validation", "--probability", "--npz", "--contours", "--labelme", "--nrrd", "--fill-holes"]
    for _ in range(2):  # the second time everything is there
        assert predict([*words, *extra]) is None
    out = tmp_path / "out"
    bits = np.asarray(Image.open(out / "x_mask.png"))
    np.testing.assert_array_equal(bits, np.where(pixels > 128, 3, np.where(pixels > 64, 1, 0)))
    for name, bright in (("bone", pixels > 64), ("implant", pixels > 128)):
        np.testing.assert_array_equal(Image.open(out / f"x_mask_{name}.png"), bright)
        assert (out / f"x_probability_{name}.png").exists()
    with (out / "areas.csv").open() as file:
        assert {row["class"]: int(row["pixels"]) for row in csv.DictReader(file)} == {"bone": 384, "implant": 192}
    assert np.load(out / "x_probability.npz")["probability"].shape == (24, 24, 2)
    assert [shape["label"] for shape in json.loads((out / "x.json").read_text())["shapes"]] == ["bone", "implant"]
    voxels, header = nrrd.read(str(out / "x_mask.seg.nrrd"))
    np.testing.assert_array_equal(voxels[1, :, :, 0].T, pixels > 128)
    assert (header["Segment1_Layer"], header["Segment1_LabelValue"]) == ("1", "1")
    with pytest.raises(UserError, match="the classes of these weights overlap"):
        predict([*words, "--nifti"])
    # What was written can be trained on.
    (tmp_path / "in").rename(out / "images")
    (out / "masks").mkdir()
    (out / "x_mask.png").rename(out / "masks/x.png")
    data = settings(out, classes={"bone": "bit 0", "implant": "bit 1"}, val_fraction=0.0, test_fraction=0.0)
    dataset = open_dataset(data)
    np.testing.assert_array_equal(read_truth(dataset.samples[0], dataset.coding)[..., 1], pixels > 128)


def test_evaluation_scores_each_class_at_its_own_threshold(
    tmp_path: Path, weights: Path, opened: tuple[Dataset, DataConfig], capsys: pytest.CaptureFixture
) -> None:
    dataset, config = opened
    words = ["--weights", str(weights), "--data.root", config.root, "--output", str(tmp_path / "e"), "--split", "all"]
    evaluate([*words, "--threshold", "validation"])
    summary = json.loads((tmp_path / "e/summary.json").read_text())
    assert summary["about"]["threshold"] == [0.4, 0.6]
    assert summary["dataset"]["multilabel"] is True
    assert "Classes overlap" in (tmp_path / "e/report.html").read_text()
    assert "used: 0.6" in (tmp_path / "e/report.html").read_text()
    choice = choose_threshold(load_model(weights), dataset, config)
    assert choice is not None
    assert len(choice.threshold) == 2  # type: ignore[arg-type]
    capsys.readouterr()
    with pytest.raises(UserError, match=r"of the model overlap, and those of .* exclude each other"):
        evaluate([*words, "--data.no-multilabel", "--data.classes", "bone", "1,3", "implant", "2"])


@pytest.mark.parametrize("form", ["onnx", "stablehlo"])
def test_an_exported_file_gives_a_mask_of_each_class(tmp_path: Path, weights: Path, form: str) -> None:
    pytest.importorskip("onnxruntime")
    lines = export(ExportOptions(str(weights), form, tmp_path / "m", threshold="validation"))  # type: ignore[arg-type]
    assert "mask: uint8 (N, H, W, 2)" in lines[2]
    assert "agrees with the model" in lines[-1]


def test_padding_is_in_every_layer(opened: tuple[Dataset, DataConfig]) -> None:
    dataset, config = opened
    wide = replace(config, size=(32, 48), fit="pad")
    (batch,) = eval_batches(dataset, "all", wide, batch_size=12, channels=1)
    assert ((batch["mask"] == PADDING).sum(axis=(0, 1, 2)) == 12 * 32 * 16).all()


@pytest.mark.stress
def test_the_commands_train_predict_and_resume_with_overlapping_classes(tmp_path: Path) -> None:
    save_overlapping(tmp_path / "data", "folders", 24)
    words = ["--config", "phantom", "--data.root", "data", "--data.multilabel", "--data.size", "32", "--workdir", "run"]
    words += [
        "--model.filters",
        "6",
        "--train.steps",
        "120",
        "--train.eval-every",
        "60",
        "--tracking.wandb",
        "disabled",
    ]
    done = run_command("train", *words, "--data.phantoms", "0", "--train.batch-size", "4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1].split()[2]) > 0.95
    done = run_command("predict", "data/images", "--weights", "run", "--output", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
