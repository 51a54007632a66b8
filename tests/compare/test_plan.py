"""Options and plan of a comparison: names of networks, numbers of steps, and what is refused."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from pdrunet_jax.compare.options import parse
from pdrunet_jax.compare.plan import (
    Plan,
    PlannedModel,
    equal_time,
    for_steps,
    full_name,
    read_plan,
    require_same,
    write_plan,
)
from pdrunet_jax.config import Config, ModelConfig, OptimConfig, TrainConfig, check
from pdrunet_jax.model.build import with_network
from pdrunet_jax.runtime.errors import DataError, UserError

SETTINGS = Config(train=TrainConfig(steps=200, eval_every=50, save_every=100, log_every=20))


def planned(text: str, settings: Config = SETTINGS, steps: int = 200) -> PlannedModel:
    return PlannedModel(full_name(text, settings), steps, with_network(settings, text).model)


def plan(*networks: str, **changes: object) -> Plan:
    whole = Plan("digest", "steps", 0, tuple(map(planned, networks)), SETTINGS)
    return replace(whole, **changes)  # type: ignore[arg-type]


def test_networks_have_one_name_however_they_are_written() -> None:
    options = parse(["--config", "phantom", "--models", "pdrunet", "depth=3 filters=8 name=unet", "unet"])
    assert options.models == ("pdrunet", "unet filters=8 depth=3", "unet")
    assert list(options.all_seeds) == [0, 1, 2]
    assert options.folder == Path("runs/compare_phantom")
    assert planned("unet depth=3 filters=8").folder == "unet_filters-8_depth-3"


def test_options_for_all_networks_are_for_those_that_have_them() -> None:
    options = parse(
        ["--config", "phantom", "--model.depth", "2", "--model.filters", "6", "--models", "pdrunet", "unet"]
    )
    pdrunet, unet = (with_network(options.settings, name).model for name in options.models)
    assert pdrunet == ModelConfig(filters=6, dropout=0.1)
    assert unet == ModelConfig(name="unet", filters=6, depth=2, dropout=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--models pdrunet", "name two networks or more"),
        ("--models unet name=unet", "'unet' and 'unet' are the same network"),
        ("--models unet,filters=16 unet", "'unet filters=16' and 'unet' are the same network"),
        ("--models pdrunet,depth=3 unet", r"the network 'pdrunet depth=3'.*model\.depth is no option of pdrunet"),
        ("--models pdrunet unet,filtres=3", "unknown setting model.filtres; did you mean filters"),
        ("--models pdrunet unet,filters=many", r"'unet filters=many'.*model\.filters"),
        ("--models pdrunet unet,in_channels=3", "give --model.in-channels"),
        ("--models pdrunet unet --model.name unet", "--model.name: name the networks with --models"),
        ("--models pdrunet unet --seeds 0", "--seeds 0: give 1 to 1000"),
        ("--models pdrunet unet --folds 1", "--folds 1: give 2 or more"),
        ("--models pdrunet unet --train.steps 0", r"the command line is not a valid.*train\.steps"),
        ("--models pdrunet unet --data.size 16", r"the network 'unet'.*data\.size must be at least 32"),
    ],
)
def test_wrong_options_are_refused_in_one_message(options: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        parse(["--config", "phantom", *(word.replace(",", " ") for word in options.split())])
    assert re.search(message, str(refused.value), re.DOTALL), refused.value


def test_equal_time_gives_a_quick_network_more_steps_and_keeps_the_shares_of_a_training() -> None:
    assert equal_time(200, 0.3, 0.1) == 600
    assert equal_time(200, 0.001, 10.0) == 1
    settings = replace(SETTINGS, optim=OptimConfig(warmup_steps=20))
    assert for_steps(settings, 200) is settings
    longer = for_steps(settings, 600)
    assert longer.train == TrainConfig(steps=600, eval_every=150, save_every=300, log_every=60)
    assert longer.optim.warmup_steps == 60
    for steps in (1, 7, 137, 199, 1001):  # as many validations, and settings that are allowed
        shorter = check(for_steps(settings, steps), "shorter")
        assert -(-steps // shorter.train.eval_every) <= 4


def test_a_plan_is_read_as_it_was_written_and_damage_is_named(tmp_path: Path) -> None:
    assert read_plan(tmp_path) is None
    written = plan("pdrunet", "unet depth=2", budget="time", folds=5)
    write_plan(written, tmp_path)
    assert read_plan(tmp_path) == written
    path = tmp_path / "plan.toml"
    text = path.read_text()
    for damaged in ("", "x", text.replace('budget = "time"', 'budget = "money"'), text.replace("steps = 200", "")):
        path.write_text(damaged)
        with pytest.raises(UserError, match=r"plan\.toml is not the plan of a comparison"):
            read_plan(tmp_path)
    path.unlink()
    (tmp_path / "unet" / "seed_0").mkdir(parents=True)
    with pytest.raises(UserError, match=r"plan\.toml is gone, and .* holds trainings; restore it"):
        read_plan(tmp_path)


def test_a_comparison_goes_on_with_more_networks_but_not_with_other_settings() -> None:
    old = plan("pdrunet", "unet")
    require_same(old, plan("unet", "fusionnet"), Path("x"))
    quiet = replace(SETTINGS, seed=7, train=replace(SETTINGS.train, samples=0))
    require_same(old, plan("pdrunet", "unet", settings=quiet), Path("x"))
    other = replace(SETTINGS, train=replace(SETTINGS.train, steps=300), optim=OptimConfig(learning_rate=0.1))
    wider = replace(planned("unet"), model=ModelConfig(name="unet", filters=8))
    with pytest.raises(DataError) as refused:
        require_same(old, plan(models=(planned("pdrunet"), wider), settings=other, folds=5, budget="time"), Path("x"))
    assert refused.value.problems == (
        "--budget: steps -> time",
        "--folds: none -> 5",
        "optim.learning_rate: 0.001 -> 0.1",
        "train.steps: 200 -> 300",
        "unet: model.filters: 40 -> 8",
    )
    with pytest.raises(UserError, match="have changed since the comparison in x was begun"):
        require_same(old, plan("pdrunet", "unet", data="other"), Path("x"))
