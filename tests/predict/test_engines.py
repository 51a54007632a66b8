"""Engines give the masks of JAX, start from what is stored, and say what computed a mask."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pdrunet_jax.evaluate.__main__ import main as evaluate
from pdrunet_jax.model.ensemble import Ensemble
from pdrunet_jax.model.ensemble import average_logits as jax_average
from pdrunet_jax.model.execution import custom_calls
from pdrunet_jax.model.load import load_model
from pdrunet_jax.model.pixels import average_logits
from pdrunet_jax.predict.__main__ import main
from pdrunet_jax.predict.engines import choice
from pdrunet_jax.predict.engines.choice import choose_engine, open_engine, open_members
from pdrunet_jax.predict.engines.engine import GRAPH_ENGINES, Engine
from pdrunet_jax.predict.engines.graphs import GraphEngine, has_bfloat16
from pdrunet_jax.predict.engines.weights import Weights
from pdrunet_jax.predict.inference import forward, segment
from pdrunet_jax.predict.outputs import RECORD_KEY
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.store import cache_folder
from tests.support.tiny import brightness_model, network, save_dataset, save_image, save_model


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    custom_calls()  # the kernels for CPUs stay in the store of all tests
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with two images, and weights with a random network in which all layers matter."""
    for name in "ab":
        save_image(tmp_path / f"in/{name}.png", np.random.default_rng(ord(name)).integers(0, 256, (48, 64)))
    save_model(network(filters=4), tmp_path / "w.safetensors", class_names=["bone"], size=[32, 48])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def predict_in(*options: str) -> int | None:
    return main(["in", "--weights", "w.safetensors", "--output", "out", *options])


def record_of(path: str) -> dict[str, object]:
    with Image.open(path) as image:
        record: dict[str, object] = json.loads(image.info[RECORD_KEY])["settings"]
    return record


CASES = {
    "pdrunet": {"outputs": 3},
    "unet": {"name": "unet", "depth": 2, "up": "transposed"},
    "fusionnet": {"name": "fusionnet", "depth": 2},
}


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("pdrunet", "onnxruntime"),
        pytest.param("pdrunet", "openvino", marks=pytest.mark.stress),
        ("unet", "openvino"),
        pytest.param("unet", "onnxruntime", marks=pytest.mark.stress),
        pytest.param("fusionnet", "openvino", marks=pytest.mark.stress),
        pytest.param("fusionnet", "onnxruntime", marks=pytest.mark.stress),
    ],
)
def test_every_network_has_the_logits_of_jax_in_every_engine(tmp_path, case, name):
    path = save_model(model := network(filters=3, **CASES[case]), tmp_path / "w.safetensors", **CASES[case])
    engine = open_engine(Weights(str(path)), name, "float32")
    for size in ((16, 24), (24, 16)):
        images = np.random.default_rng(0).integers(0, 256, (1, *size, 1), np.uint8)
        want = np.asarray(forward(model, images))
        np.testing.assert_allclose(engine.logits(images), want, rtol=0, atol=2e-5 * max(1, np.abs(want).max()))


@pytest.mark.parametrize("name", [pytest.param("jax", marks=pytest.mark.stress), *GRAPH_ENGINES])
def test_masks_tiles_mirror_images_and_classes_are_those_of_segment(tmp_path, name):
    path = save_model(brightness_model(3), tmp_path / "w.safetensors", class_names=["femur", "tibia"])
    model, engine = load_model(path), open_engine(Weights(str(path)), name, "float32")
    image = np.random.default_rng(0).integers(0, 256, (70, 90), np.uint8)
    for options in ({}, {"augmentation": "flips"}, {"size": "own", "tile": 16, "halo": 8}, {"size": (20, 30)}):
        want, got = segment(model, image, **options), segment(engine, image, **options)
        np.testing.assert_array_equal(got.mask, want.mask)
        np.testing.assert_allclose(got.probability, want.probability, atol=1e-5)


def test_stored_programs_of_jax_give_the_same_bits_traced_or_stored(place):
    images = np.random.default_rng(0).integers(0, 256, (1, 32, 48, 1), np.uint8)
    want = np.asarray(forward(load_model("w.safetensors"), images))
    for _ in range(2):
        engine = open_engine(Weights("w.safetensors"), "jax", "float32")
        np.testing.assert_array_equal(engine.logits(images), want)
    assert {path.name.split("-")[0] for path in (place / "cache/pdrunet_jax/prepared").iterdir()} == {
        "network", "arrays", "program",
    }  # fmt: skip


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("outputs", [1, 3])
def test_an_ensemble_averages_as_in_jax(outputs, multilabel):
    logits = [np.random.default_rng(seed).normal(0, 30, (1, 5, 6, outputs)).astype(np.float32) for seed in range(3)]
    want = np.asarray(jax_average(logits, multilabel=multilabel))
    got = average_logits(logits, multilabel=multilabel)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    logits[1][0, 0, 0, 0] = np.nan
    assert np.isnan(average_logits(logits, multilabel=multilabel)[0, 0, 0, 0])


def test_folds_are_averaged_together_and_open_one_by_one(place, monkeypatch):
    members = [network(seed, filters=4) for seed in (1, 2)]
    weights = Weights("w.safetensors")
    weights.count, weights.key = 2, ""
    monkeypatch.setitem(vars(weights), "network", Ensemble(members))
    images = np.random.default_rng(0).integers(0, 256, (1, 32, 48, 1), np.uint8)
    together = open_engine(weights, "onnxruntime", "float32")
    np.testing.assert_allclose(together.logits(images), forward(Ensemble(members), images), atol=1e-5)
    for engine, member in zip(open_members(weights, "onnxruntime", "float32"), members, strict=True):
        np.testing.assert_allclose(engine.logits(images), forward(member, images), atol=1e-5)


def test_the_record_names_engine_and_precision_and_another_engine_is_refused(place, capsys):
    predict_in("--engine", "onnxruntime")
    record = record_of("out/a_mask.png")
    assert (record["engine"], record["precision"]) == ("onnxruntime", "float32")
    with pytest.raises(UserError, match="engine was onnxruntime, is jax"):
        predict_in()
    predict_in("--engine", "auto")  # as for the results that are there
    assert "engine: onnxruntime, as for the results in out" in capsys.readouterr().out
    predict_in("--overwrite")
    assert record_of("out/a_mask.png")["engine"] == "jax"


def test_a_warm_start_in_another_engine_loads_no_jax_and_reports_to_nobody(place):
    predict_in("--engine", "onnxruntime")
    predict_in("--engine", "openvino", "--overwrite")
    code = (
        "import sys; from pdrunet_jax.predict.__main__ import main\n"
        "for name in ('onnxruntime', 'openvino'):\n"
        "    main(['in', '--weights', 'w.safetensors', '--output', name, '--engine', name])\n"
        "used = {name for name, module in sys.modules.items() if module}\n"
        "print(sorted({'jax', 'flax', 'onnx', 'pydicom', 'torch', 'openvino_telemetry'} & used))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert Path("openvino/b_mask.png").read_bytes() == Path("out/b_mask.png").read_bytes()


def test_damaged_entries_of_the_store_are_made_again(place, capsys):
    for engine in ("jax", "onnxruntime"):
        predict_in("--engine", engine, "--overwrite")
    entries = sorted((place / "cache/pdrunet_jax/prepared").iterdir())
    assert {entry.name.split("-")[0] for entry in entries} == {"network", "arrays", "program", "graph"}
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[:-1] + b"?")
    before = Path("out/a_mask.png").read_bytes()
    for engine in ("jax", "onnxruntime"):
        predict_in("--engine", engine, "--overwrite")
    assert capsys.readouterr().err.count("is removed and made again") == 4
    assert Path("out/a_mask.png").read_bytes() == before


def test_a_store_that_others_may_write_to_is_not_used(place):
    folder = place / "cache/pdrunet_jax/prepared"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    predict_in("--engine", "onnxruntime")
    assert not list(folder.iterdir())
    assert cache_folder() == folder.parent


def test_other_weights_under_the_same_name_are_other_weights(place):
    images = np.random.default_rng(0).integers(0, 256, (1, 32, 48, 1), np.uint8)
    for seed in (0, 1):
        save_model(model := network(seed, filters=4), place / "w.safetensors", class_names=["bone"], size=[32, 48])
        for name in ("jax", "onnxruntime"):
            got = open_engine(Weights("w.safetensors"), name, "float32").logits(images)
            np.testing.assert_allclose(got, forward(model, images), atol=1e-5)


def test_auto_takes_an_engine_whose_mask_agrees_and_says_so(place, capsys):
    predict_in("--engine", "auto")
    engine = record_of("out/a_mask.png")["engine"]
    assert engine == GRAPH_ENGINES[0]
    assert f"engine: {engine}; 0 of 3,072 pixels of the first image differ from JAX" in capsys.readouterr().out
    main(["in", "--weights", "w.safetensors", "--output", "again", "--engine", "auto"])
    assert f"engine: {engine}; 0 of 3,072 pixels of an earlier image differ" in capsys.readouterr().out


def test_auto_takes_jax_where_no_engine_agrees(place, monkeypatch):
    class Wrong(GraphEngine):
        def logits(self, images: np.ndarray) -> np.ndarray:
            return -super().logits(images)

    monkeypatch.setattr(choice, "GraphEngine", Wrong)
    image = np.asarray(Image.open("in/a.png"))

    def mask(engine: Engine) -> np.ndarray:
        return segment(engine, image).mask

    engine, found = choose_engine(Weights("w.safetensors"), "float32", mask, [])
    assert engine.name == "jax"
    assert "openvino does not agree with JAX: 3,072 of 3,072 pixels" in found


@pytest.mark.stress
@pytest.mark.skipif(not has_bfloat16(), reason="a processor without bfloat16")
def test_bfloat16_is_used_only_when_asked_for(place):
    images = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 1), np.uint8)
    weights = Weights("w.safetensors")
    exact = forward(load_model("w.safetensors"), images)
    for name in ("jax", "openvino"):
        assert np.abs(open_engine(weights, name, "float32").logits(images) - exact).max() < 1e-5
        assert 1e-4 < np.abs(open_engine(weights, name, "bfloat16").logits(images) - exact).max() < 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--engine", "onnxruntime", "--precision", "bfloat16"], "onnxruntime computes in float32 only"),
        (["--engine", "openvino"], "--engine openvino needs the packages openvino and onnx: pip install"),
    ],
)
def test_what_an_engine_lacks_is_said_before_any_work(place, monkeypatch, options, words):
    monkeypatch.setattr(
        "pdrunet_jax.predict.engines.engine.find_spec", lambda name: None if name == "openvino" else name
    )
    with pytest.raises(UserError, match=words):
        predict_in(*options)
    assert not Path("out").exists()


def test_evaluate_scores_with_an_engine_and_states_it(place):
    save_dataset(place / "data")
    save_model(brightness_model(), place / "b.safetensors", class_names=["square"], size=[24, 32])
    scores = {}
    for name in ("jax", "onnxruntime", "auto"):
        evaluate(["--weights", "b.safetensors", "--data.root", "data", "--output", name, "--engine", name])
        scores[name] = json.loads((place / name / "summary.json").read_text())
    assert [each["about"]["engine"] for each in scores.values()] == ["jax", "onnxruntime", GRAPH_ENGINES[0]]
    assert scores["jax"]["line"] == scores["onnxruntime"]["line"] == scores["auto"]["line"]
