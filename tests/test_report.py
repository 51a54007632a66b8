import json
import re
from html.parser import HTMLParser

import pytest
from tiny import brightness_model, save_dataset

from pdrunet_jax.config import Config, DataConfig, TrackingConfig
from pdrunet_jax.curves import curve, read_metrics
from pdrunet_jax.data.dataset import open_dataset
from pdrunet_jax.errors import UserError
from pdrunet_jax.evaluation import evaluate_split, write_evaluation
from pdrunet_jax.report import write_report
from pdrunet_jax.runfolder import open_run

SECTIONS = ["scores", "curves", "cases", "data", "speed", "configuration", "environment"]


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


@pytest.fixture
def run(tmp_path):
    config = Config(
        data=DataConfig(root=str(save_dataset(tmp_path / "data", errors={5: 3})), size=(24, 32), threads=1),
        tracking=TrackingConfig(tags=("<b>&",)),
    )
    run = open_run(tmp_path / "a run", config, device="cpu, float32")
    lines = [{"step": step, "train/loss": 2.0 / step, "train/dice": 1 - 1 / step} for step in range(1, 21)]
    lines += [{"step": 20, "val/loss": 0.4, "val/dice": 0.8}, {"step": 20, "time/images_per_second": 7.5}]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 21, "train/lo')
    dataset = open_dataset(config.data)
    evaluation = evaluate_split(brightness_model(), dataset, "test", config.data)
    write_evaluation(evaluation, run.path / "evaluation" / "test")
    return run


def test_the_report_has_every_section_and_loads_nothing(run):
    text = write_report(run.path).read_text()
    page = Page(text)
    assert not page.open
    assert [name for name in page.ids if name in SECTIONS] == SECTIONS
    assert page.loads
    assert all(value.startswith("data:image/png;base64,") for value in page.loads)
    assert not re.search(r"https?://|url\(|@import|<script|<link", text)
    assert "prefers-color-scheme: dark" in text
    assert text.count("<svg") == 2
    assert text.count("<polyline") == 4  # loss and Dice, of training and validation
    assert "$" not in page.words


def test_the_report_states_scores_splits_settings_and_environment(run):
    words = Page(write_report(run.path).read_text()).words
    summary = json.loads((run.path / "evaluation" / "test" / "summary.json").read_text())
    assert f"{summary['macro']['dice']['mean']:.3f}" in words
    assert f"{summary['macro']['dice']['low']:.3f} to" in words
    for fact in ("a run", "squares", "learning_rate", "cpu, float32", "images/5.png", "7.5", "0.800", "jaxlib"):
        assert fact in words
    assert "<b>&" in words  # escaped, so that it arrives as text


def test_a_report_before_the_first_scores_says_what_is_missing(tmp_path):
    run = open_run(tmp_path / "run", Config())
    words = Page(write_report(run.path).read_text()).words
    assert words.count("None yet") == 3
    assert run.report.is_file()


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


def test_long_curves_are_thinned_without_losing_their_end():
    points = [(float(step), 1.0 / step) for step in range(1, 100_001)]
    drawn = curve("Loss", {"training": points})
    assert len(drawn) < 12_000
    assert "100k" in drawn
