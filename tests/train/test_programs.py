"""Stored steps: the same bits as steps that are traced, and never those of other settings."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pdrunet_jax import config as config_io
from pdrunet_jax.train import programs
from pdrunet_jax.train.programs import StepPrograms
from pdrunet_jax.train.step import build_model, create_state, make_eval_step, make_train_step
from tests.train.test_step import batch, copy, same

CONFIG = config_io.from_dict(
    {
        "data": {"size": [32], "root": "here"},
        "model": {"name": "unet", "filters": 2, "depth": 1},
        "optim": {"ema": 0.9},
        "train": {"batch_size": 4, "steps": 10},
    },
    "test",
)


def steps(config: Any, make_train: Any, make_eval: Any) -> list[Any]:
    """State and metrics of two steps, and the scores of the weights after them."""
    graphdef, state = create_state(config, build_model(config, 1))
    state = copy(state)
    train, judge, data = make_train(graphdef), make_eval(graphdef), batch()
    for _ in range(2):
        state, metrics = train(state, data)
    return copy([state, metrics, judge(*state.weights, data)])


def stored(config: Any) -> list[Any]:
    """The same with stored programs."""
    opened = StepPrograms(config, 1, None, ())
    return steps(config, opened.train_step, opened.eval_step)


def traced(config: Any) -> list[Any]:
    """The same with steps that are traced."""
    return steps(
        config, lambda graph: make_train_step(config, graph, 1), lambda graph: make_eval_step(config, graph, 1)
    )


def test_stored_steps_give_the_same_bits_and_only_for_the_same_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    want = traced(CONFIG)
    assert same(stored(CONFIG), want)
    entries = sorted((tmp_path / "pdrunet_jax" / "prepared").glob("program-*"))
    assert len(entries) == 2

    # From the store, also for data elsewhere and another fold.
    moved = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, root="there", fold="1/5"))
    with monkeypatch.context() as without:
        without.setattr(programs, "make_program", lambda *_: pytest.fail("traced again"))
        assert same(stored(moved), want)

    # A damaged one is made again.
    entries[0].write_bytes(entries[0].read_bytes()[:-1])
    assert same(stored(CONFIG), want)
    assert capsys.readouterr().err.count("is removed and made again") == 1

    # Other settings have steps of their own.
    other = dataclasses.replace(CONFIG, optim=dataclasses.replace(CONFIG.optim, learning_rate=0.02))
    got = stored(other)
    assert same(got, traced(other))
    assert not same(got[0].params, want[0].params)
    assert float(np.float32(0.02)) >= float(got[1]["learning_rate"]) > float(want[1]["learning_rate"])
