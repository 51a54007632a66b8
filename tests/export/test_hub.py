"""What `export --format hub` writes is loaded from the folder and from a Hub, and what others wrote is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from pdrunet_jax.export.__main__ import main
from pdrunet_jax.model.load import load_model
from pdrunet_jax.predict.inference import segment
from pdrunet_jax.runtime.errors import DataError, UserError
from pdrunet_jax.runtime.extras import how_to_install
from tests.support import ROOT
from tests.support.fake_hub import COMMIT, serve_hub
from tests.support.tiny import brightness_model, save_model

pytest.importorskip("huggingface_hub")

IMAGE = np.random.default_rng(0).integers(0, 256, (20, 30), np.uint8)
SUMMARY = {
    "line": "test dice 0.905 (95% 0.850-0.960, 7 images, 3 patients)",
    "split": "test",
    "images": 7,
    "unit": "mm",
    "classes": {
        "bone: long": {
            "dice": {"mean": 0.905, "low": 0.85, "high": 0.96},
            "hd95": {"mean": 3.25, "low": None, "high": None},
        },
        "absent": {"dice": {"mean": None, "low": None, "high": None}},
    },
}
PROGRAM = """
import sys
from pdrunet_jax.model.load import load_model
from pdrunet_jax.predict.inference import segment
from pdrunet_jax.runtime.errors import UserError
import numpy as np
for address in sys.argv[2:]:
    try:
        mask = segment(load_model(address), np.load(sys.argv[1])).mask
        print(f"{address}: {mask.sum()}")
    except UserError as error:
        print(error)
"""


def exported(folder: Path, *arguments: str, **options: object) -> Path:
    weights = save_model(brightness_model(), folder / "w.safetensors", size=[16], class_names=["bone"], **options)
    main(["--weights", str(weights), "--format", "hub", "--output", str(folder / "model"), *arguments])
    return folder / "model"


def test_a_folder_for_the_hub_is_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    (run / "evaluation/test").mkdir(parents=True)
    (run / "evaluation/test/summary.json").write_text(json.dumps(SUMMARY))
    (run / "config.toml").write_text("damaged")  # whoever needs the settings reports that
    weights = save_model(brightness_model(), run / "best.safetensors", size=[16], class_names=["bone: long"])
    target = tmp_path / "new/knee"
    main(f"--weights {weights} --format hub --output {target} --license cc-by-4.0".split())
    assert sorted(path.name for path in target.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert SUMMARY["line"] in capsys.readouterr().out
    want = segment(load_model(weights), IMAGE)
    for source in (target, target / "model.safetensors"):
        np.testing.assert_array_equal(segment(load_model(source), IMAGE).probability, want.probability)

    _, front, card = (target / "README.md").read_text().split("---\n", 2)
    facts = yaml.safe_load(front)
    assert facts["license"] == "cc-by-4.0"
    assert (facts["library_name"], facts["pipeline_tag"]) == ("pdrunet-jax", "image-segmentation")
    assert "pdrunet" in facts["tags"]
    result = facts["model-index"][0]["results"][0]
    assert result["metrics"] == [{"type": "dice", "name": "Dice, bone: long", "value": 0.905}]
    assert "| bone: long | 0.905 (0.850 to 0.960) |  | 3.250 |  |" in card
    assert "On 7 test images" in card
    from huggingface_hub import ModelCard

    assert ModelCard.load(target / "README.md").data.eval_results[0].metric_value == 0.905

    with pytest.raises(UserError, match="name a new folder"):
        main(f"--weights {weights} --format hub --output {target} --force".split())
    with pytest.raises(UserError, match="leave out --size"):
        main(f"--weights {weights} --format hub --output {tmp_path / 'x'} --size 32".split())
    (run / "evaluation/test/summary.json").write_text("{}")
    with pytest.raises(UserError, match=r"summary\.json is damaged"):
        main(f"--weights {weights} --format hub --output {tmp_path / 'x'}".split())
    assert not (tmp_path / "x").exists()


def test_a_folder_that_was_changed_or_is_foreign_is_refused(tmp_path: Path) -> None:
    model = exported(tmp_path)
    config = json.loads((model / "config.json").read_text())
    config["options"]["size"] = [32]
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"not of one export.*\n.*size is \[32\], in model.safetensors \[16\]"):
        load_model(model)
    for text, message in (
        ('{"model_type": "segformer"}', "of another library, not of pdrunet-jax"),
        ("[]", "of another library"),
        ("{", "cannot be read as JSON"),
    ):
        (model / "config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            load_model(model)


def test_models_are_loaded_from_a_hub(tmp_path: Path) -> None:
    """In a process of its own: huggingface_hub reads HF_ENDPOINT when it is imported."""
    model = exported(tmp_path)
    foreign = tmp_path / "foreign"
    shutil.copytree(model, foreign)
    (foreign / "config.json").write_text('{"library_name": "transformers"}')
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "image.npy", IMAGE)
    pixels = segment(load_model(model), IMAGE).mask.sum()

    def load(endpoint: str, *addresses: str, **settings: str) -> list[str]:
        settings |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c", PROGRAM, tmp_path / "image.npy", *addresses]
        environment = {**os.environ, **settings, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    repositories = {"me/knee": model, "me/foreign": foreign, "me/empty": tmp_path / "empty", "gated/knee": model}
    names = (
        "me/knee",
        f"me/knee@{COMMIT}",
        "me/knee@v9",
        "me/none",
        "me/foreign",
        "me/empty",
        "gated/knee",
        "a",
        "-/-",
    )
    with serve_hub(repositories) as endpoint:
        lines = load(endpoint, *(f"hf://{name}" for name in names))
    assert lines[:2] == [f"hf://me/knee: {pixels}", f"hf://me/knee@{COMMIT}: {pixels}"]
    expected = (
        "hf://me/knee@v9: the repository has no such revision",
        "hf://me/none: there is no such repository, or it is private",
        "'transformers', not of pdrunet-jax",
        "hf://me/empty: the repository lacks config.json",
        "hf://gated/knee: access is restricted",
        "hf://a: give hf://OWNER/NAME",
        "hf://-/-: this is not a name that the Hub allows",
    )
    assert len(lines) == len(names)
    for line, message in zip(lines[2:], expected, strict=True):
        assert message in line
    # Without a connection: what was downloaded is used, and what was not is named.
    known, unknown = load("http://127.0.0.1:1", "hf://me/knee", "hf://me/other", HF_HUB_OFFLINE="1")
    assert known == f"hf://me/knee: {pixels}"
    assert "hf://me/other: the Hub cannot be reached" in unknown


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError) as error:
        load_model("hf://me/knee")
    assert str(error.value) == f"hf://me/knee needs huggingface_hub: {how_to_install('hub')}"
