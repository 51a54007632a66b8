import base64
import csv
import hashlib
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pdrunet_jax.config import Config, DataConfig, TrackingConfig
from pdrunet_jax.data.dataset import open_dataset
from pdrunet_jax.evaluate.compare import Other, compare, write_comparison
from pdrunet_jax.evaluate.evaluation import evaluate_split, write_evaluation
from pdrunet_jax.evaluate.report.charts import curve, read_metrics
from pdrunet_jax.evaluate.report.page import write_evaluation_report, write_report
from pdrunet_jax.evaluate.scores import ScoringOptions, read_csv
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.run_folder import RunFolder
from pdrunet_jax.train.run import open_run
from tests.support.tiny import brightness_model, save_dataset

SECTIONS = ["scores", "curves", "cases", "images", "calibration", "data", "speed", "configuration", "environment"]
HOSTILE = "</td><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\"'"


class Page(HTMLParser):
    """Tags that balance, ids, and everything a browser would load."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.loads, self.words = [], [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        self.loads += [values[name] for name in ("src", "href", "srcset", "data", "action") if name in values]
        if tag not in ("meta", "img", "br", "link", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("report")
    config = Config(
        data=DataConfig(root=str(save_dataset(path / "data", errors={5: 3})), size=(24, 32), threads=1),
        tracking=TrackingConfig(tags=("<b>&",)),
    )
    run = open_run(path / "a run", config, device="cpu, float32")
    lines = [{"step": step, "train/loss": 2.0 / step, "train/dice": 1 - 1 / step} for step in range(1, 21)]
    lines += [{"step": 20, "val/loss": 0.4, "val/dice": 0.8}, {"step": 20, "time/images_per_second": 7.5}]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 21, "train/lo')
    dataset = open_dataset(config.data)
    evaluation = evaluate_split(brightness_model(), dataset, "test", config.data)
    about = {"weights": "w.safetensors", "threshold": 0.5, "validation_threshold": 0.44, "seconds": 1.5}
    write_evaluation(evaluation, run.path / "evaluation" / "test", about, {"python": "3.12.1"})
    return run


@pytest.fixture
def folder(run, tmp_path):
    return Path(shutil.copytree(run.path / "evaluation" / "test", tmp_path / "scores"))


def many(folder, count, name="image {}"):
    """Make the evaluation in `folder` one of `count` images."""
    head, first, *_ = (folder / "per_image.csv").read_text().splitlines()
    scores = first.split(",")[3:]
    with (folder / "per_image.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(head.split(","))
        writer.writerows([name.format(number), f"p{number}", "square", *scores] for number in range(count))


def test_the_report_has_every_section_and_loads_nothing(run):
    text = write_report(run.path).read_text()
    page = Page(text)
    assert not page.open
    assert [name for name in page.ids if name in SECTIONS] == SECTIONS
    assert len(page.loads) == 4 * 3
    assert all(value.startswith("data:image/jpeg;base64,") for value in page.loads)
    assert not re.search(r"https?://|url\(|@import|<link|<script[^>]", text)
    assert "prefers-color-scheme: dark" in text
    assert text.count("<svg") == 4
    assert len(re.findall('<polyline class="line ', text)) == 6  # loss and Dice, training and validation; calibration
    assert "$" not in page.words


def test_the_page_allows_its_own_script_and_nothing_else(run):
    text = write_report(run.path).read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src 'none'; img-src data:;")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy


def test_the_report_states_scores_splits_settings_and_environment(run):
    words = Page(write_report(run.path).read_text()).words
    summary = json.loads((run.path / "evaluation" / "test" / "summary.json").read_text())
    assert f"{summary['macro']['dice']['mean']:.3f}" in words
    assert f"{summary['macro']['dice']['low']:.3f} to" in words
    for fact in ("a run", "squares", "learning_rate", "cpu, float32", "images/5.png", "7.5", "0.800", "jaxlib"):
        assert fact in words
    assert "<b>&" in words  # escaped, so that it arrives as text
    error = summary["expected_calibration_error"]["square"]
    assert f"square: expected calibration error {error:.4f} over {3 * 24 * 32:,} pixels" in words
    assert "Best threshold on the validation images: 0.44" in words
    assert "its score is biased" in words


def test_a_report_before_the_first_scores_says_what_is_missing(tmp_path):
    run = open_run(tmp_path / "run", Config())
    words = Page(write_report(run.path).read_text()).words
    assert words.count("None yet") == 6
    assert run.report.is_file()


def test_without_test_images_the_report_of_a_run_has_the_validation_scores(run, tmp_path):
    other = RunFolder(shutil.copytree(run.path, tmp_path / "run"))
    (other.path / "evaluation" / "test").rename(other.path / "evaluation" / "val")
    summary = other.path / "evaluation" / "val" / "summary.json"
    summary.write_text(summary.read_text().replace('"split": "test"', '"split": "val"'))
    words = Page(write_report(other.path).read_text()).words
    assert "Scores on the validation images" in words
    assert "biased" not in words


def test_an_evaluation_has_a_report_of_its_own(folder):
    page = Page(write_evaluation_report(folder).read_text())
    assert not page.open
    assert [name for name in page.ids if name in SECTIONS] == [name for name in SECTIONS if name != "curves"]
    for fact in ("squares, test images", "w.safetensors", "validation_threshold", "3.12.1", "total seconds1.5"):
        assert fact in page.words
    with pytest.raises(UserError, match=r"summary\.json"):
        write_evaluation_report(folder.parent)


def test_a_comparison_with_another_evaluation_is_a_section(folder):
    rows = read_csv(folder / "per_image.csv")
    other = Other("<other>", tuple(replace(row, dice=row.dice - 0.25) for row in rows))
    write_comparison(compare(rows, other, ScoringOptions()), rows, other, folder)
    page = Page(write_evaluation_report(folder).read_text())
    assert not page.open
    assert "comparison" in page.ids
    assert "This minus other (<other>), on the same 3 images" in page.words
    assert re.search(r"dice0\.\d{3}0\.\d{3}\+0\.250\+0\.250 to \+0\.2500\.5300", page.words)
    assert "changed most" in page.words


def test_names_are_shown_and_never_run(folder):
    many(folder, 2, name=HOSTILE)
    summary = json.loads((folder / "summary.json").read_text())
    summary["cases"][0]["image"] = summary["dataset"]["name"] = summary["about"]["weights"] = HOSTILE
    summary["classes"] = {HOSTILE: summary["classes"]["square"]}
    summary["dataset"]["classes"] = [HOSTILE, "other"]
    (folder / "summary.json").write_text(json.dumps(summary))
    curves = json.loads((folder / "curves.json").read_text())
    (folder / "curves.json").write_text(json.dumps({HOSTILE: curves["square"], "other": curves["square"]}))
    text = write_evaluation_report(folder).read_text()
    page = Page(text)
    assert not page.open
    assert text.count("<script") == 1
    assert len(page.loads) == 4 * 3
    assert page.words.count(HOSTILE) >= 7


def test_the_table_of_every_image_sorts_by_exact_scores(folder):
    text = write_evaluation_report(folder).read_text()
    table = re.search(r'<table class="sortable">.*?</table>', text, re.DOTALL)[0]
    heads = re.findall(r'<th scope="col"[^>]*>([^<]*)</th>', table)
    assert heads[:3] == ["image", "patient", "dice"]  # the class says nothing where there is one
    exact = [float(value) for value in re.findall(r'data-value="([^"]*)"', table)]
    with (folder / "per_image.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert exact[0] == pytest.approx(float(rows[0]["dice"]))
    assert len(re.findall("<tr>", table)) == 1 + 3


def test_a_report_of_very_many_and_very_noisy_images_stays_below_five_megabytes(folder):
    many(folder, 10_000, name="a folder with a rather long name/and another one below it/image_{:06}_left_lateral.png")
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    for panel in (folder / "cases").iterdir():
        Image.fromarray(noise).save(panel)
    page = write_evaluation_report(folder)
    assert len(re.findall("<tr>", page.read_text())) < 2_100
    assert "2,000 rows with the lowest Dice" in page.read_text()
    size = page.stat().st_size
    assert size + (7 - 3) * 4 * noise.nbytes < 5_000_000  # as if all seven cases were there, uncompressed


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"config\.toml"):
        write_report(tmp_path)


def test_a_step_written_again_counts_once_and_what_is_not_finite_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 5}\n{"step": 2, "a": null}\n{"step": 1, "a": 6}\n{"step": 3, "a": NaN}\n[]\n')
    assert read_metrics(path) == {"a": [(1, 6)]}
    assert read_metrics(tmp_path / "none") == {}


@pytest.mark.parametrize(
    "points",
    [[(0, 0.0)], [(5, 1.0), (6, 1.0)], [(1, 1e-7), (2, 3e4)], [(1, 5.0), (100_000, 0.012)], [(1, -2.0), (9, 3)]],
)
def test_curves_stay_inside_their_frame(points):
    drawn = curve("Loss", {"training": points, "validation": []})
    places = re.search(r'points="([^"]*)"', drawn).group(1).replace(",", " ").split()
    assert all(52 <= float(x) <= 466 for x in places[::2])
    assert all(33.9 <= float(y) <= 260.1 for y in places[1::2])
    assert "nan" not in drawn


def test_marks_lie_where_the_axes_say():
    marks = {"axis": "threshold", "at": (0.5, "used: 0.5"), "reference": [(0, 0), (1, 1)], "bars": [(0.0, 0.5, 0.25)]}
    drawn = curve("A" * 50, {"Dice": [(0.0, 1.0), (1.0, 0.0)]}, 1.0, **marks)
    assert '<polyline class="reference" points="52.0,260.0 466.0,34.0"/>' in drawn
    assert '<line class="reference" x1="259.0" x2="259.0" y1="34.0" y2="260.0"/>' in drawn
    assert '<rect class="bar" x="52.5" y="203.5" width="206.0" height="56.5"/>' in drawn
    assert f">{'A' * 35}…<" in drawn


def test_long_curves_are_thinned_without_losing_their_end():
    points = [(float(step), 1.0 / step) for step in range(1, 100_001)]
    drawn = curve("Loss", {"training": points})
    assert len(drawn) < 12_000
    assert "100k" in drawn
