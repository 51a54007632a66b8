"""Weights that come with the package: names, cards, and how they are made; with weights of the test's own."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import pdrunet_jax
from pdrunet_jax.evaluate.__main__ import main as evaluate
from pdrunet_jax.evaluate.scores import CSV_COLUMNS
from pdrunet_jax.model import shipped
from pdrunet_jax.model.files import read_weights, write_safetensors
from pdrunet_jax.predict.__main__ import main as predict
from pdrunet_jax.runtime.digest import CONTENT, content_digest
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.weights.__main__ import main as weights
from pdrunet_jax.weights.publish import publish
from tests.support.tiny import brightness_model, save_image, save_model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package's folder with one set of weights, called tiny; and an empty working directory."""
    place = tmp_path / "shipped"
    place.mkdir()
    save_model(brightness_model(), place / "tiny.safetensors", size=[32], class_names=["bone"])
    (place / "tiny.md").write_text("# tiny\n")
    monkeypatch.setattr(shipped, "FOLDER", place)
    shipped._say.cache_clear()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return place


def test_a_name_stands_for_weights_of_the_package_unless_a_path_has_it(folder, capsys) -> None:
    assert pdrunet_jax.load_model("tiny").size == (32, 32)
    assert "tiny: the weights that come with pdrunet-jax" in capsys.readouterr().err
    save_image(Path("xray.png"), np.tile(np.arange(0, 256, 8), (32, 1)))
    assert not predict(["xray.png", "--weights", "tiny", "--output", "out"])
    assert Path("out/xray_mask.png").exists()
    # What the user has comes first, and nothing is taken in silence.
    save_model(brightness_model(), Path("tiny"), size=[16], class_names=["bone"])
    assert pdrunet_jax.load_model("tiny").size == (16, 16)
    assert "what has this name in" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"tinny: there is no such file or folder, and the weights .* are tiny"):
        pdrunet_jax.load_model("tinny")
    with pytest.raises(UserError, match=r"no such file or folder$"):  # a path is no name that was mistyped
        pdrunet_jax.load_model("runs/tinny.pth")


def test_scores_of_a_name_are_in_a_folder_of_that_name(folder) -> None:
    grey = np.tile(np.arange(0, 256, 8), (32, 1))
    for kind in ("images", "masks"):
        Path("xrays", kind).mkdir(parents=True)
        save_image(Path("xrays", kind, "a.png"), grey if kind == "images" else (grey > 127) * 255)
    evaluate(["--weights", "tiny", "--data.root", "xrays", "--split", "all"])
    assert Path("evaluation", "tiny_xrays", "all", "per_image.csv").is_file()


def test_the_command_lists_weights_and_prints_cards(folder, capsys, monkeypatch) -> None:
    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["weights", *arguments])
        weights()
        return capsys.readouterr().out

    assert "tiny  bone" in run()
    assert "pdrunet predict --weights tiny xray.png" in run("list")
    assert run("card", "tiny") == "# tiny\n"
    with pytest.raises(UserError, match="other: no weights of this name; choose one of tiny"):
        run("card", "other")
    for path in folder.iterdir():
        path.unlink()
    assert "no weights come with this copy" in run()


def finished_run(path: Path) -> Path:
    """A run folder with nothing but what publishing reads."""
    path.mkdir()
    (path / "training_images.txt").write_text("# digests\n0016736d32fd81de\n00186d747a861caf\n")
    (path / "config.toml").write_text(
        '[data]\nsize = [32]\nfit = "pad"\n[model]\nfilters = 1\nnorm = "none"\n[environment]\ngit = "abc123"\n'
    )
    best = path / "best.safetensors"
    save_model(brightness_model(), best)
    file = read_weights(best)
    stated = {"size": [32, 32], "fit": "pad", "class_names": ["bone"], "filters": 1, "name": "pdrunet", "outputs": 1}
    options = {**file.options, **stated, "step": 10, "val_dice": 0.9, "threshold": 0.4, "norm": "none"}
    write_safetensors(best, file.arrays, {**options, CONTENT: content_digest(file.arrays, options)})
    return path


def test_publishing_writes_weights_and_a_card_with_their_scores(tmp_path: Path) -> None:
    run, data, scores = finished_run(tmp_path / "run"), tmp_path / "data", tmp_path / "scores"
    data.mkdir()
    scores.mkdir()
    (data / "drawn.csv").write_text("image,body,view,drawn\na.png,A,pelvis,\nb.png,A,knee,\nc.png,B,knee,\n")
    rest = "0.5," * 8
    rows = [
        f"{image},{body},bone,{dice},{rest}{pixels},5"
        for image, body, dice, pixels in (("a.png", "A", 0.5, 9), ("b.png", "A", 0.9, 9), ("c.png", "B", 1.0, 0))
    ]
    (scores / "per_image.csv").write_text("\n".join([",".join(CSV_COLUMNS), *rows]) + "\n")
    about = {"weights": str(finished_run(tmp_path / "on other bodies")), "data": str(data)}
    (scores / "summary.json").write_text(json.dumps({"about": about}))
    (tmp_path / "out").mkdir()
    made, card = publish(run, "lower-limb", [("Bodies never trained on", scores)], tmp_path / "out")
    text = card.read_text()
    assert "### Bodies never trained on\n\nWeights of the same network, trained without these bodies: 10 " in text
    assert "| bone | all views | 0.700 | " in text  # c.png shows no bone
    assert text.index("| bone | knee | 0.900 |  | 1 | 1 |") < text.index("| bone | pelvis | 0.500 |  | 1 | 1 |")
    assert "revision abc123" in text
    assert "$" not in text
    model, same = pdrunet_jax.load_model(made), pdrunet_jax.load_model(run)
    image = np.linspace(0, 1, 32 * 32, dtype=np.float32).reshape(1, 32, 32, 1)
    assert np.array_equal(model(image), same(image))
    assert (model.fit, model.size) == ("pad", (32, 32))
    # Nothing is shipped without scores, or with those of other weights.
    with pytest.raises(UserError, match="weights are not shipped without scores"):
        publish(run, "lower-limb", [], tmp_path / "out")
    with pytest.raises(UserError, match="small letters"):
        publish(run, "../x", [("a", scores)], tmp_path / "out")
    other = finished_run(tmp_path / "other")
    (other / "config.toml").write_text((other / "config.toml").read_text().replace("[data]", "[data]\nthreads = 1"))
    (scores / "summary.json").write_text(json.dumps({"about": {**about, "weights": str(other)}}))
    publish(run, "lower-limb", [("a", scores)], tmp_path / "out")
    # Other settings of training are named, and scores of another network refused.
    plain = (run / "config.toml").read_text()
    (other / "config.toml").write_text("[train]\nsteps = 9\n" + plain)
    named = "without these bodies: 10 steps of 8 drawn X-rays. Other settings: `train.steps: 10000 -> 9`."
    assert named in publish(run, "lower-limb", [("a", scores)], tmp_path / "out")[1].read_text()
    (other / "config.toml").write_text(plain.replace("filters = 1", "filters = 2"))
    with pytest.raises(UserError, match=r"is another network(.|\n)*model\.filters: 1 -> 2"):
        publish(run, "lower-limb", [("a", scores)], tmp_path / "out")
    # A training that started from the weights of another one.
    (other / "config.toml").write_text('[data]\nsurfaces = "bodies"\n' + plain.replace("[data]\n", ""))
    (run / "config.toml").write_text(f"[train]\nbatch_size = 4\nweights = '{other}'\n" + plain)
    text = publish(run, "lower-limb", [("a", scores)], tmp_path / "out")[1].read_text()
    assert "The weights that this training started from, which had not seen these bodies." in text
    assert (
        "| 10 steps of 8 drawn X-rays, none of them twice; then 10 steps of 4 drawn X-rays; 2 were drawn beforehand |"
        in text
    )
    (run / "config.toml").write_text('[train]\nbatch_size = 4\nweights = "lower-limb"\n' + plain)
    text = publish(run, "lower-limb-bones", [("a", scores)], tmp_path / "out")[1].read_text()
    assert "| the weights lower-limb; then 10 steps of 4 drawn X-rays; 2 were drawn beforehand |" in text
    (scores / "summary.json").write_text("{}")
    with pytest.raises(UserError, match="is not the summary"):
        publish(run, "lower-limb", [("a", scores)], tmp_path / "out")
