"""Exported files do what the model does, resizing and decision included, without this package."""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from pdrunet_jax.data.fit import Fit
from pdrunet_jax.data.images import resize_image
from pdrunet_jax.data.phantoms.phantom import draw
from pdrunet_jax.export import __main__ as command
from pdrunet_jax.export.__main__ import ExportOptions, main
from pdrunet_jax.export.check import Agreement, Run, check_images, compare_outputs
from pdrunet_jax.export.onnx_graph import build_onnx, open_onnx
from pdrunet_jax.export.stablehlo import (
    GraphSpec,
    build_stablehlo,
    open_stablehlo,
    pillow_resizes_tall_first,
)
from pdrunet_jax.model.base import Network
from pdrunet_jax.model.files import read_weights, write_safetensors
from pdrunet_jax.model.layers import BatchNorm
from pdrunet_jax.model.load import load_model
from pdrunet_jax.predict.inference import forward, segment
from pdrunet_jax.runtime.errors import RunError, UserError
from pdrunet_jax.runtime.extras import how_to_install
from tests.support.tiny import brightness_model, network, overflowing_model, save_image, save_model

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

FORMATS = ("onnx", "stablehlo")
BUILD = {"onnx": build_onnx, "stablehlo": build_stablehlo}
OPEN = {"onnx": open_onnx, "stablehlo": open_stablehlo}


def trained(**options: object) -> Network:
    """A network whose normalisations are not the initial ones."""
    model = network(**{"filters": 4, "dropout": 0.0, **options})
    numbers = np.random.default_rng(0)
    for _, norm in nnx.iter_modules(model):
        if isinstance(norm, BatchNorm):
            lowest = (norm.scale, 0.5), (norm.bias, -0.2), (norm.running_mean, -0.3), (norm.running_var, 0.5)
            for variable, low in lowest:
                drawn = numbers.uniform(low, low + 0.5, variable.shape)
                variable.set_value(jnp.asarray(drawn, variable[...].dtype))
    return model


@pytest.mark.parametrize("form", FORMATS)
def test_a_model_whose_logits_are_not_finite_is_not_exported(tmp_path: Path, form: str) -> None:
    weights = save_model(overflowing_model(), tmp_path / "w.safetensors")
    with pytest.raises(RunError, match="the network computes NaN"):
        main(["--weights", str(weights), "--format", form, "--output", str(tmp_path / "x"), "--size", "16"])
    assert not (tmp_path / "x").exists()


def opened(model: Network, form: str, size: tuple[int, int], threshold: float = 0.5, tall_first: bool = True) -> Run:
    return OPEN[form](BUILD[form](model, GraphSpec(size, threshold, tall_first)))


def export(weights: Path, output: Path, **options: Any) -> list[str]:
    return command.export(ExportOptions(str(weights), output=output, **options))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return save_model(trained(), tmp_path / "weights.safetensors", size=[32, 48], class_names=["bone"])


DILATED: tuple[dict[str, object], ...] = (
    {"filters": 40},
    {"outputs": 3, "shortcut": "conv1", "in_channels": 3},
)
OTHERS: tuple[dict[str, object], ...] = (
    {"name": "unet", "depth": 2},
    {"name": "unet", "depth": 1, "up": "bilinear_corners", "outputs": 3},
    {"name": "fusionnet", "depth": 2, "down": "stride", "up": "bilinear"},
    {"name": "fusionnet", "depth": 1, "norm": "none"},
)


AGREEING = [*product(FORMATS, DILATED), *product(FORMATS, OTHERS[:1]), *product(["onnx"], OTHERS[1:])]


# A network of the public width takes longer to run than to compile.
@pytest.mark.parametrize(
    ("form", "options"),
    [pytest.param(*case, marks=pytest.mark.optimised if case[1] == DILATED[0] else ()) for case in AGREEING],
    ids=str,
)
def test_a_file_agrees_with_the_model_it_was_made_of(form: str, options: dict[str, object], tmp_path: Path) -> None:
    size = (45, 38) if "name" in options else (32, 48)
    source = save_model(trained(**options), tmp_path / "a.safetensors", size=size, **options)
    lines = export(source, tmp_path / "file", format=form)
    assert "agrees with the model on 5 images" in lines[-1]
    run, model = OPEN[form]((tmp_path / "file").read_bytes()), load_model(source)
    for height, width, count in ((70, 50, 3), (40, 90, 1)):
        images = np.stack([draw(number, size=96).image[:height, :width] for number in range(count)])
        images = np.repeat(images[..., None], model.in_channels, axis=-1)
        got = run(images)
        assert got["mask"].dtype == np.uint8
        assert got["mask"].shape == (count, height, width)
        assert got["probability"].dtype == got["logits"].dtype == np.float32
        for number, image in enumerate(images):
            want = segment(model, image)
            logits = np.asarray(forward(model, resize_image(image, size)[None]))[0]
            np.testing.assert_allclose(got["logits"][number], logits, rtol=0, atol=1e-4)
            np.testing.assert_allclose(got["probability"][number], want.probability, rtol=0, atol=1e-5)
            assert np.mean(got["mask"][number] != want.mask) < 0.001


@pytest.mark.parametrize("options", OTHERS[1:3], ids=str)
def test_a_dynamic_file_runs_the_network_at_each_images_own_size(options: dict[str, object], tmp_path: Path) -> None:
    source, image = save_model(trained(**options), tmp_path / "a.safetensors", size=[16], **options), draw(0, size=46)
    given = {"format": "onnx", "dynamic": True, "check_image": (save_image(tmp_path / "i.png", image.image[:33]),)}
    lines = export(source, tmp_path / "whole.onnx", **given)
    assert "works at each image's own size" in lines[-2]
    export(source, tmp_path / "network.onnx", network_only=True, **given)
    whole, network_only = (open_onnx((tmp_path / f"{name}.onnx").read_bytes()) for name in ("whole", "network"))
    pixels = image.image[None, :33, :, None]
    got, alone = whole(pixels), network_only(pixels.astype(np.float32) / 255)
    want = segment(load_model(source), pixels[0], size="own")
    np.testing.assert_allclose(got["probability"][0], want.probability, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(got["mask"][0], want.mask)
    np.testing.assert_array_equal(got["logits"], alone["logits"])
    np.testing.assert_array_equal(got["probability"], alone["probability"])
    assert "mask" not in alone


@pytest.mark.parametrize("form", FORMATS)
def test_the_network_alone_takes_what_the_model_takes(form: str, weights: Path, tmp_path: Path) -> None:
    lines = export(weights, tmp_path / "x", format=form, network_only=True)
    assert lines[1] == "  images: float32 (N, 32, 48, 1), grey values, [0, 1]"
    images = np.random.default_rng(0).random((2, 32, 48, 1), np.float32)
    got, model = OPEN[form]((tmp_path / "x").read_bytes())(images), load_model(weights)
    logits = np.asarray(model(jnp.asarray(images)))
    np.testing.assert_allclose(got["logits"], logits, rtol=0, atol=1e-4)
    np.testing.assert_allclose(got["probability"], 1 / (1 + np.exp(-logits[..., 0])), rtol=0, atol=1e-5)
    assert got.keys() == {"probability", "logits"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--format onnx --dynamic --size 32", "leave out --size or --dynamic"),
        ("--format stablehlo --dynamic", "--dynamic is for --format onnx"),
        ("--format html --network-only", "--network-only is for"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    arguments: str, message: str, weights: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        main(["--weights", str(weights), "--output", str(tmp_path / "x"), *arguments.split()])
    assert not (tmp_path / "x").exists()


@pytest.mark.optimised
@pytest.mark.parametrize("form", FORMATS)
def test_the_network_sees_pillows_pixels_bit_for_bit(form: str) -> None:
    """Seen through a model whose logits are 32 times its input, less 16."""
    run = opened(brightness_model(), form, (24, 40), tall_first=pillow_resizes_tall_first())
    shapes = [(24, 40), (60, 90), (72, 40), (72, 41), (7, 9), (24, 13)]  # the third and fourth vertically first
    if form == "onnx":  # StableHLO is compiled for each shape
        shapes += [tuple(shape) for shape in np.random.default_rng(1).integers(1, 200, (40, 2))]
    for shape in shapes:
        pixels = np.random.default_rng(0).integers(0, 256, (1, *shape, 1), np.uint8)
        seen = np.rint((run(pixels)["logits"][0] + 16) / 32 * 255)
        np.testing.assert_array_equal(seen, resize_image(pixels[0], (24, 40)), err_msg=str(shape))


@pytest.mark.optimised
@pytest.mark.parametrize("form", FORMATS)
def test_a_model_that_pads_is_followed_bit_for_bit(form: str) -> None:
    model, size = brightness_model(), (24, 40)
    model.fit = "pad"
    run = OPEN[form](BUILD[form](model, GraphSpec(size, 0.5, pillow_resizes_tall_first(), "pad")))
    for shape in ((60, 90), (201, 34), (7, 9)):
        pixels = np.random.default_rng(0).integers(0, 256, (1, *shape, 1), np.uint8)
        got, want = run(pixels), segment(model, pixels[0], size=size)
        seen = np.rint((got["logits"][0] + 16) / 32 * 255)
        np.testing.assert_array_equal(seen, Fit(size, "pad").image(pixels[0]), err_msg=str(shape))
        np.testing.assert_allclose(got["probability"][0], want.probability, rtol=0, atol=1e-6)


def test_a_model_of_a_fixed_spacing_is_refused(tmp_path: Path) -> None:
    weights = save_model(brightness_model(), tmp_path / "w.safetensors", size=[32], fit="pad", spacing=0.3)
    with pytest.raises(UserError, match="not told the spacing"):
        export(weights, tmp_path / "x.onnx", format="onnx")


@pytest.mark.optimised
@pytest.mark.parametrize("form", FORMATS)
def test_a_pillow_that_always_starts_horizontally_is_followed(form: str) -> None:
    run = opened(brightness_model(), form, (16, 16), tall_first=False)
    pixels = np.random.default_rng(0).integers(0, 256, (80, 20), np.uint8)
    horizontal = Image.fromarray(pixels).resize((16, 80), Image.Resampling.BILINEAR)
    want = np.asarray(horizontal.resize((16, 16), Image.Resampling.BILINEAR))
    seen = np.rint((run(pixels[None, ..., None])["logits"][0, ..., 0] + 16) / 32 * 255)
    np.testing.assert_array_equal(seen, want)


@pytest.mark.parametrize("form", FORMATS)
def test_the_threshold_is_inside(form: str) -> None:
    model = trained()
    image = draw(0, size=64).image[None, ..., None]
    probability = segment(model, image[0], size=(32, 32)).probability
    threshold = float(np.quantile(probability, 0.9))
    share = opened(model, form, (32, 32), threshold)(image)["mask"].mean()
    assert share == pytest.approx(0.1, abs=0.01)


def test_stablehlo_needs_nothing_but_jax(weights: Path, tmp_path: Path) -> None:
    file = read_weights(weights)
    write_safetensors(weights, file.arrays, {**file.options, "threshold": 0.4})
    export(weights, tmp_path / "model.stablehlo", format="stablehlo", threshold="validation")
    images = np.stack([draw(number, size=40).image for number in range(3)])[..., None]
    np.save(tmp_path / "images.npy", images)
    program = """
import json, sys, jax, numpy as np
from jax import export
artifact = export.deserialize(bytearray(open("model.stablehlo", "rb").read()))
segment, images = jax.jit(artifact.call), np.load("images.npy")
one, three = segment(images[:1]), segment(images)
assert not [name for name in sys.modules if name.startswith(("pdrunet", "flax"))]
assert np.abs(one["probability"][0] - three["probability"][0]).max() < 1e-6
np.save("mask.npy", three["mask"])
print(json.dumps([json.loads(artifact.fun_name), artifact.platforms]))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    facts, platforms = json.loads(done.stdout)
    assert platforms == ["cpu", "cuda", "tpu"]
    assert facts["class_names"] == ["background", "bone"]
    assert (facts["size"], facts["threshold"]) == ([32, 48], 0.4)
    want = [segment(load_model(weights), image, threshold=0.4).mask for image in images]
    assert np.mean(np.load(tmp_path / "mask.npy") != want) < 0.001


def test_an_onnx_file_states_what_it_takes(weights: Path, tmp_path: Path) -> None:
    export(weights, tmp_path / "model.onnx", format="onnx", size=(48, 32))
    model = onnx.load(tmp_path / "model.onnx")
    facts = {item.key: item.value for item in model.metadata_props}
    assert json.loads(facts["class_names"]) == ["background", "bone"]
    assert json.loads(facts["size"]) == [48, 32]
    assert "uint8 (N, H, W, 1)" in facts["input"]
    assert [output.name for output in model.graph.output] == ["mask", "probability", "logits"]
    assert {tensor.name for tensor in model.graph.initializer} <= {x for node in model.graph.node for x in node.input}
    types = {tensor.data_type for tensor in model.graph.initializer}
    assert onnx.TensorProto.DOUBLE not in types, "some runtimes compute float64 in float32"
    assert "e1.first.weight" in {tensor.name for tensor in model.graph.initializer}
    assert [dim.dim_param for dim in model.graph.input[0].type.tensor_type.shape.dim] == ["N", "H", "W", ""]
    assert {item.domain: item.version for item in model.opset_import} == {"": 17}


def test_a_file_that_disagrees_is_not_written(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: Network, spec: GraphSpec) -> bytes:
        model.final_conv.bias.set_value(model.final_conv.bias[...] + 1e-3)
        data = build_onnx(model, spec)
        model.final_conv.bias.set_value(model.final_conv.bias[...] - 1e-3)
        return data

    monkeypatch.setitem(command.FORMATS, "onnx", (wrong, open_onnx))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(RunError, match=r"do not agree.*logits 1\.0e-03"):
        export(weights, tmp_path / "model.onnx", format="onnx")
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "model.onnx").write_text("precious")
    with pytest.raises(RunError):
        export(weights, tmp_path / "model.onnx", format="onnx", force=True)
    assert (tmp_path / "model.onnx").read_text() == "precious"


def test_nan_is_no_agreement(weights: Path) -> None:
    model = load_model(weights)
    run = opened(model, "onnx", (32, 48))

    def broken(images: np.ndarray) -> dict[str, np.ndarray]:
        got = run(images)
        got["logits"][-1, 0, 0] = np.nan
        return got

    images = check_images((), 1)
    assert compare_outputs(run, model, images, GraphSpec((32, 48), 0.5, True)).good
    assert not compare_outputs(broken, model, images, GraphSpec((32, 48), 0.5, True)).good


def test_large_logits_may_differ_in_proportion() -> None:
    small = Agreement(2e-4, 5.0, 0.0, 0, 0, 1, 1, ((1, 1),))
    assert not small.good
    assert small._replace(largest_logit=30.0).good
    assert not small._replace(largest_logit=30.0, inconsistent=1).good


def test_images_to_check_on_can_be_given(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = save_image(tmp_path / "a.png", draw(3, size=60).image[:44])
    target = tmp_path / "new" / "model.onnx"
    main(["--weights", str(weights), "--format", "onnx", "--output", str(target), "--check-image", str(image)])
    out = capsys.readouterr().out
    assert "3 images of 44 x 60, 33 x 45 pixels" in out
    assert "0 of 5,610 mask pixels differ (0.0000%)" in out
    assert target.exists()
    (tmp_path / "bad.png").write_text("no image")
    with pytest.raises(UserError, match=r"bad\.png"):
        export(weights, tmp_path / "b.onnx", format="onnx", check_image=(tmp_path / "bad.png",))
    assert not (tmp_path / "b.onnx").exists()


def test_nothing_is_overwritten_without_force(weights: Path, tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    target.write_text("precious")
    with pytest.raises(UserError, match="--force"):
        export(weights, target, format="onnx")
    assert target.read_text() == "precious"
    export(weights, target, format="onnx", force=True)
    onnx.checker.check_model(str(target))
    with pytest.raises(UserError, match="is the file to read itself"):
        export(weights, weights, format="onnx", force=True)
    with pytest.raises(UserError, match="is a folder"):
        export(weights, tmp_path, format="onnx", force=True)


def test_a_size_is_needed_where_the_weights_tell_none(tmp_path: Path) -> None:
    source = save_model(trained(), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="give --size"):
        export(source, tmp_path / "a.onnx", format="onnx")
    main(["--weights", str(source), "--format", "onnx", "--output", str(tmp_path / "a.onnx"), "--size", "32"])
    with pytest.raises(UserError, match="--size 1 2 3"):
        main(f"--weights {source} --format onnx --output {tmp_path / 'b.onnx'} --size 1 2 3".split())
    with pytest.raises(UserError, match="threshold"):
        export(source, tmp_path / "b.onnx", format="onnx", size=(32, 32), threshold=2.0)


def test_weights_in_float64_are_exported_in_float32(tmp_path: Path) -> None:
    with jax.enable_x64(True):
        model = trained(param_dtype=jnp.float64)
        source = save_model(model, tmp_path / "a.safetensors", size=[32, 32])
    export(source, tmp_path / "a.onnx", format="onnx")
    kinds = {tensor.data_type for tensor in onnx.load(tmp_path / "a.onnx").graph.initializer if "." in tensor.name}
    assert kinds == {onnx.TensorProto.FLOAT}


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named_with_its_remedy(package: str, weights: Path, tmp_path: Path) -> None:
    program = f"""
import sys
sys.modules[{package!r}] = None
from pdrunet_jax.export.__main__ import main
from pdrunet_jax.runtime import cli
cli.run(lambda: main(["--weights", {str(weights)!r}, "--format", "onnx", "--output", "out"]))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: --format onnx needs {package}: {how_to_install('export')}\n"
    assert not (tmp_path / "out").exists()


def test_importing_the_command_loads_no_optional_library() -> None:
    program = "import sys, pdrunet_jax.export.__main__; print({'onnx', 'onnxruntime', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
