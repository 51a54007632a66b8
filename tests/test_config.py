import dataclasses
import tomllib
from pathlib import Path

import pytest

from pdrunet_jax.config import Config, diff, from_dict, load, parse, to_toml
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.train import options
from tests.support import ROOT

SHIPPED = sorted(path.stem for path in (ROOT / "configs").glob("*.toml"))


def test_the_configurations_are_shipped() -> None:
    assert SHIPPED == [
        "lower_limb",
        "lower_limb_bones",
        "lower_limb_own",
        "mura",
        "mura_baseline",
        "mura_small",
        "paper",
        "phantom",
    ]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_configuration_opens_with_its_command_and_loads(name: str, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # so that it is the shipped copy, not ./configs
    path = ROOT / "configs" / f"{name}.toml"
    assert path.read_text().startswith(f"# python -m pdrunet_jax.train --config {name}")
    assert load(name) == parse(path.read_text(), name)


def test_toml_round_trip_keeps_every_setting() -> None:
    config = from_dict(
        {
            "seed": 7,
            "data": {"size": [64, 96], "classes": {"femur": 1, "tibia": "#ff0000"}, "ignore": 255},
            "model": {"outputs": 3, "filters": 12},
            "loss": {"class_weights": [1.0, 2.0, 3.0]},
            "optim": {"learning_rate": 3e-4},
        },
        "test",
    )
    assert parse(to_toml(config, "a\n\nb"), "test") == config
    assert parse(to_toml(Config()), "test") == Config()


def test_every_problem_of_a_configuration_is_reported_at_once() -> None:
    text = 'sed = 1\n[optim]\nlearning_rat = 1.0\nb1 = 1.5\n[model]\nfilters = "many"\n'
    with pytest.raises(UserError) as error:
        parse(text, "my.toml")
    message = str(error.value)
    assert message.startswith("my.toml")
    assert "unknown setting sed; did you mean seed?" in message
    assert "unknown setting optim.learning_rat; did you mean learning_rate?" in message
    assert "optim.b1" in message
    assert "model.filters" in message


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[train]\nbatch_size = 6\n[optim]\naccumulate = 4\n", "optim.accumulate"),
        ("[train]\nsteps = 10\n[optim]\nwarmup_steps = 10\n", "optim.warmup_steps"),
        ("[data]\nval_fraction = 0.6\ntest_fraction = 0.4\n", "data.val_fraction"),
        ("[data]\nsize = [1, 2, 3]\n", "data.size"),
        ("[optim]\nlearning_rate = nan\n", "optim.learning_rate"),
    ],
)
def test_settings_that_do_not_work_are_refused_by_name(text: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        parse(text, "test")


def test_broken_toml_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("[data\n")
    with pytest.raises(UserError, match=r"broken\.toml"):
        load(path)


def test_an_unknown_configuration_lists_the_shipped_ones() -> None:
    with pytest.raises(
        UserError, match="lower_limb, lower_limb_bones, lower_limb_own, mura, mura_baseline, mura_small, paper, phantom"
    ):
        load("mira")


def test_the_difference_names_each_setting_with_both_values() -> None:
    old = Config()
    new = dataclasses.replace(old, seed=1, optim=dataclasses.replace(old.optim, learning_rate=3e-3))
    assert diff(old, new) == ["optim.learning_rate: 0.001 -> 0.003", "seed: 0 -> 1"]
    assert diff(old, new, ignore=("optim", "seed")) == []


def test_options_override_the_configuration_with_hyphen_or_underscore() -> None:
    parsed = options.parse(
        ["--config", "phantom", "--train.batch_size", "4", "--optim.learning-rate", "0.1", "--data.size", "64", "96"]
    ).settings
    assert (parsed.train.batch_size, parsed.optim.learning_rate, parsed.data.height_width) == (4, 0.1, (64, 96))
    assert parsed.train.steps == load("phantom").train.steps


def test_classes_can_be_declared_as_options() -> None:
    parsed = options.parse(["--config", "mura", "--data.classes", "femur", "1", "tibia", "#ff0000"]).settings
    assert parsed.data.classes == {"femur": 1, "tibia": "#ff0000"}


def test_classes_on_the_command_line_are_a_whole_new_set(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[data]\nclasses = { bone = 255 }\nthreshold = 100\nignore = 127\nsize = [64]\n")
    data = options.parse(["--config", str(path), "--data.classes", "femur", "2", "tibia", "1"]).settings.data
    assert list(data.classes) == ["femur", "tibia"]
    assert (data.threshold, data.ignore, data.size) == (None, None, (64,))
    pairs = options.parse(["--config", str(path), "--data.swap-on-flip", "a", "b", "c", "d"]).settings.data
    assert (pairs.swap_on_flip, pairs.threshold) == ((("a", "b"), ("c", "d")), 100)
    assert parse(to_toml(Config(data=pairs)), "it") == Config(data=pairs)


def test_options_out_of_bounds_are_refused_with_the_bound() -> None:
    with pytest.raises(UserError, match=r"optim\.learning_rate: input should be greater than 0"):
        options.parse(["--config", "mura", "--optim.learning-rate", "-1"])


def test_a_missing_config_option_says_what_to_type() -> None:
    with pytest.raises(UserError, match="--config phantom"):
        options.parse(["--train.steps", "3"])


def test_an_unknown_option_leaves_with_code_2_and_proposes_the_right_one(capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        options.parse(["--config", "mura", "--train.step", "3"])
    assert exit_.value.code == 2
    assert "--train.steps" in capsys.readouterr().err


@pytest.mark.parametrize("removed", ['spike = "off"\nspike_factor = 5.0\nspike_window = 50\n', "spike_factor = 3.0\n"])
def test_spike_detection_that_was_off_in_an_older_run_is_ignored(removed: str) -> None:
    assert parse(f"[train]\nsteps = 20\n{removed}", "config.toml") == parse("[train]\nsteps = 20\n", "config.toml")


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_spike_detection_that_was_on_in_an_older_run_is_refused_by_name(policy: str) -> None:
    with pytest.raises(UserError, match=r"config\.toml.*\n.*unknown setting train\.spike"):
        parse(f'[train]\nspike = "{policy}"\n', "config.toml")


@pytest.mark.parametrize("text", ["train = 1\n", "[train]\nspikes = 1\n"])
def test_other_wrong_settings_of_training_are_still_refused(text: str) -> None:
    with pytest.raises(UserError, match="train"):
        parse(text, "config.toml")


def test_a_run_records_its_environment_beside_its_settings() -> None:
    text = to_toml(Config()) + '\n[environment]\njax = "0.10"\n'
    assert tomllib.loads(text)["environment"] == {"jax": "0.10"}
    assert parse(text, "test") == Config()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nsteps = 1e21", "train.steps: "),
        ("[train]\nsteps = 2147483648", "train.steps: input should be less than or equal to 2147483647"),
        ("[data]\nthreads = 100000", "data.threads: input should be less than or equal to 1024"),
        ("[data]\nsize = [1000000]", "data.size.0: input should be less than or equal to 65536"),
        ("seed = 9223372036854775808", "seed: input should be less than 9223372036854775808"),
        (f"seed = {'9' * 5000}", "is not valid TOML: Exceeds the limit"),
        ('[data]\nroot = "a\\u0000b"', "data.root: NUL characters are not allowed"),
    ],
)
def test_absurd_values_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(text, "c.toml")
    assert message in str(caught.value)
