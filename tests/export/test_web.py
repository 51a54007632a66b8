"""The page segments what `predict` segments, is corrected and saved by hand, and opens no connection."""

import json
import re
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from pdrunet_jax.data.importers.labelme import ImportLabelme, import_labelme
from pdrunet_jax.data.labelme.write import labelme_text
from pdrunet_jax.export import page as page_module
from pdrunet_jax.export.__main__ import main
from pdrunet_jax.export.page import TEMPLATE
from pdrunet_jax.model.load import load_model
from pdrunet_jax.predict.inference import segment
from pdrunet_jax.runtime.errors import UserError
from tests.support import ROOT
from tests.support.page_files import write_page_files
from tests.support.tiny import brightness_model, save_image, save_model

for package in ("onnx", "onnxruntime", "pydicom"):
    pytest.importorskip(package)

WEB = ROOT / "web"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MOST_BYTES = 8_000_000
ROUNDING = 1e-6  # of probabilities, between two implementations of the network

needs_page = pytest.mark.skipif(not TEMPLATE.exists(), reason="the page is not built: run make web")
needs_node = pytest.mark.skipif(
    not (shutil.which("node") and (WEB / "node_modules").is_dir()), reason="no Node.js, or its packages: run make web"
)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


class Session(NamedTuple):
    page: Path
    weights: Path
    images: dict[str, Path]
    output: Path
    report: dict[str, Any]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """One session of `web/test/session.js`: its page, images, downloads and report."""
    assert CHROMIUM
    folder = tmp_path_factory.mktemp("page")
    weights = save_model(brightness_model(), folder / "w.safetensors", size=[64, 48], class_names=["</script>bone"])
    page, output = folder / "page.html", folder / "output"
    main(["--weights", str(weights), "--format", "html", "--output", str(page)])
    images = write_page_files(folder / "images")
    damaged = folder / "damaged.png"
    damaged.write_bytes((folder / "images/gamma.png").read_bytes()[:900])
    large = save_image(folder / "large.png", np.kron(np.arange(20).reshape(4, 5) * 13, np.ones((1250, 800))))
    output.mkdir()
    command = ["node", WEB / "test/session.js", CHROMIUM, page, output, *images, damaged, large]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return Session(page, weights, {path.name: path for path in images}, output, json.loads(done.stdout))


def corners(labelme: str) -> list[set[tuple[float, float]]]:
    """The points of each polygon. Of several polygons or cuts of one cost, either may be taken."""
    return [set(map(tuple, shape["points"])) for shape in json.loads(labelme)["shapes"]]


@needs_page
@needs_node
@needs_browser
def test_masks_of_the_page_are_those_of_predict(session: Session) -> None:
    model = load_model(session.weights)
    archive = zipfile.ZipFile(session.output / "all.zip")
    for name, path in session.images.items():
        stem, twin = path.stem, [other for other in session.images if Path(other).stem == path.stem]
        target = name.replace(".", "_") if len(twin) > 1 else stem
        mask = np.asarray(Image.open(archive.open(f"{target}_mask.png")))
        want = segment(model, path)
        assert mask.shape == want.mask.shape, name
        undecided = np.abs(want.probability - 0.5) < ROUNDING
        assert np.array_equal(mask[~undecided], want.mask[~undecided]), name
        drawn = corners(archive.read(f"{target}.json").decode())
        wanted = corners(labelme_text(mask, ["</script>bone"], "a"))
        assert len(drawn) == len(wanted), name
        differing = sum(len(ours ^ theirs) for ours, theirs in zip(drawn, wanted, strict=True))
        assert differing <= 0.05 * sum(map(len, wanted)), name
    rows = archive.read("areas.csv").decode().splitlines()
    assert len(rows) == len(session.images) + 2
    assert rows[-1].startswith("large.png,")
    assert re.fullmatch(r"[\d.]+ s", session.report["states"]["large.png"])
    assert session.report["states"]["damaged.png"].startswith("damaged or truncated PNG")
    window = next(row for row in rows if row.startswith("window.dcm"))
    pixels, area = window.split(",")[-2:]
    assert float(area) == pytest.approx(int(pixels) * 0.2 * 0.3, abs=1e-4)


@needs_page
@needs_node
@needs_browser
def test_what_is_drawn_can_be_undone_and_saved(session: Session, tmp_path: Path) -> None:
    seen = session.report["seen"]
    areas = {name: step["areas"][0] for name, step in seen.items() if isinstance(step, dict)}
    assert areas["erased"] < areas["opened"] == areas["undone"]
    assert areas["redone"] == areas["erased"] < areas["brushed"]
    assert areas["cut"] < areas["brushed"]
    assert areas["cut"] < areas["added"] <= areas["filled"]
    assert areas["largest"] == areas["restored"]
    assert "mm²" in seen["area"]
    mask = np.asarray(Image.open(session.output / "mask.png"))
    assert int((mask == 1).sum()) == areas["largest"]
    # Back into a dataset by import-labelme.
    first = next(iter(session.images.values()))
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    shutil.copy(session.output / "labelme.json", drawn / f"{first.stem}.json")
    shutil.copy(first, drawn / first.name)
    import_labelme(ImportLabelme(drawn, tmp_path / "dataset"))
    imported = np.asarray(Image.open(next((tmp_path / "dataset/masks").rglob("*.png")))) > 0
    assert 2 * (imported & (mask > 0)).sum() / (imported.sum() + (mask > 0).sum()) > 0.995


@needs_page
@needs_node
@needs_browser
def test_the_page_opens_no_connection_and_is_labelled(session: Session) -> None:
    assert set(session.report["requests"]) <= {"file:", "blob:"}
    assert session.report["errors"] == []
    assert session.report["seen"]["blocked"]
    assert session.report["seen"]["unlabelled"] == []
    assert not session.report["seen"]["scrolls"], "wider than a phone"


@needs_page
def test_a_page_holds_its_policy_and_is_small(tmp_path: Path) -> None:
    weights = save_model(brightness_model(), tmp_path / "w.safetensors", size=[16])
    main(["--weights", str(weights), "--format", "html", "--output", str(tmp_path / "page.html")])
    text = (tmp_path / "page.html").read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy
    assert {"default-src 'none'", "connect-src 'none'"} <= set(policy[1].split("; "))
    assert "http-equiv" in text.split("<title>")[0]
    assert "Not a medical device" in text
    for owner in ("Microsoft Corporation", "Chris Hafey", "Benoit Macq", "Jan de Vaan", "D. R. Commander"):
        assert owner in text, "the license of each part"
    assert len(text.encode()) < MOST_BYTES - 1_900_000  # a model of 40 filters takes 1.9 MB


@needs_node
def test_modules_of_the_page() -> None:
    tests = sorted((WEB / "test").glob("*.test.js"))
    done = subprocess.run(["node", "--test", *tests], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_missing_template_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = save_model(brightness_model(), tmp_path / "w.safetensors", size=[16])
    arguments = ["--weights", str(weights), "--format", "html", "--output", str(tmp_path / "x.html")]
    monkeypatch.setattr(page_module, "TEMPLATE", tmp_path / "none.html")
    with pytest.raises(UserError, match="run make web"):
        main(arguments)
    (tmp_path / "none.html").write_text("<html></html>")
    with pytest.raises(UserError, match="run make web again"):
        main(arguments)
    assert not (tmp_path / "x.html").exists()
