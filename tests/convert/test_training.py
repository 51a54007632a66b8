"""A whole training in PyTorch's form and back: what is carried, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from pdrunet_jax import config as configuration
from pdrunet_jax.convert import __main__ as command
from pdrunet_jax.convert.__main__ import ConvertOptions, main
from pdrunet_jax.model.load import load_weights
from pdrunet_jax.runtime.errors import DataError, UserError
from tests.support import ROOT

torch = pytest.importorskip("torch")

from pdrunet_torch_ref import PDRUNet as Twin  # noqa: E402 - it needs torch
from pdrunet_torch_ref import training_state  # noqa: E402
from pdrunet_torch_ref.training import make_loss, train_step  # noqa: E402

CONFIG = """
[data]
root = "data"
size = [32]
phantoms = 12
[model]
filters = 4
[optim]
ema = 0.9
clip_norm = 1.0
[train]
steps = 8
batch_size = 2
save_every = 4
eval_every = 8
samples = 0
[tracking]
wandb = "disabled"
"""


def convert(src: Path, dst: Path, **options: Any) -> list[str]:
    return command.convert(ConvertOptions(src, dst, **options))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(CONFIG, encoding="utf-8")
    return path


def own_training(**changes: Any) -> dict[str, Any]:
    """What a training script of one's own would save after two steps of Adam, under its own names."""
    torch.manual_seed(0)
    twin = Twin(filters=4)
    optimizer = torch.optim.Adam(twin.parameters(), lr=1e-3)
    for _ in range(2):
        train_step(twin, optimizer, make_loss("bce", 1), torch.rand(2, 1, 8, 8), torch.ones(2, 8, 8))
    content = {"model_state_dict": twin.state_dict(), "optimizer_state_dict": optimizer.state_dict(), "epoch": 1}
    return {key: value for key, value in (content | changes).items() if value is not None}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.pth"
    torch.save(own_training(), path)
    return path


def train(config: Path, run: str) -> None:
    command = [sys.executable, "-m", "pdrunet_jax.train", "--config", config.name, "--workdir", run]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=config.parent, check=True, capture_output=True, timeout=300, env=environment)


def test_training_goes_on_bit_for_bit_after_a_detour_through_pytorch(config: Path, tmp_path: Path) -> None:
    train(config, "straight")
    state, back = tmp_path / "state.pth", tmp_path / "back"
    convert(tmp_path / "straight" / "checkpoints" / "4", state, to_torch_training_state=True)
    held = training_state.load(state)
    assert held.step == 4
    arrays = [*dict(held.model.named_parameters()), *dict(held.model.named_buffers())]
    assert held.ema.keys() == {name for name in arrays if not name.startswith("e5.")}
    again = tmp_path / "again.pth"
    training_state.save(again, held)
    convert(again, back)
    assert load_weights(back).options["filters"] == 4  # usable before it is trained on
    train(config, "back")
    ours, theirs = (load_file(tmp_path / run / "best.safetensors") for run in ("straight", "back"))
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)
    lines = (tmp_path / "back" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [8, 8]


def test_a_training_script_of_ones_own_goes_on_here(own: Path, config: Path, tmp_path: Path) -> None:
    text = config.read_text(encoding="utf-8").replace("ema = 0.9", "")
    config.write_text(text, encoding="utf-8")
    lines = convert(own, tmp_path / "run", config=str(config))
    assert "step 2, adam" in lines[0]
    back = tmp_path / "back.pth"
    main([str(tmp_path / "run"), str(back), "--to-torch-training-state"])
    before = torch.load(own, weights_only=True)["optimizer_state_dict"]
    after = torch.load(back, weights_only=True)["optimizer"]
    assert after["state"].keys() == before["state"].keys()
    for index, mine in before["state"].items():
        for name, tensor in mine.items():
            assert torch.equal(after["state"][index][name], tensor), (index, name)
    assert after["param_groups"] == before["param_groups"]


def test_a_training_run_of_lightning_goes_on_here(own: Path, config: Path, tmp_path: Path) -> None:
    config.write_text(config.read_text(encoding="utf-8").replace("ema = 0.9", ""), encoding="utf-8")
    content = torch.load(own, weights_only=True)
    state = {f"net.{name}": tensor for name, tensor in content["model_state_dict"].items()}
    lightning = {"epoch": 1, "global_step": 2, "state_dict": state | {"loss_fn.pos_weight": torch.ones(1)}}
    torch.save(lightning | {"optimizer_states": [content["optimizer_state_dict"]]}, tmp_path / "last.ckpt")
    lines = convert(tmp_path / "last.ckpt", tmp_path / "run", config=str(config))
    assert "step 2, adam" in lines[0]
    assert "  removed the prefix 'net.' from every name" in lines
    main([str(tmp_path / "run"), str(tmp_path / "back.pth"), "--to-torch-training-state"])
    after = torch.load(tmp_path / "back.pth", weights_only=True)
    for index, mine in content["optimizer_state_dict"]["state"].items():
        assert all(torch.equal(after["optimizer"]["state"][index][name], tensor) for name, tensor in mine.items())


def test_without_a_configuration_its_weights_alone_are_converted(own: Path, tmp_path: Path) -> None:
    lines = convert(own, tmp_path / "run")
    assert any("took the weights under 'model_state_dict', not epoch, optimizer_state_dict" in line for line in lines)


def broken(**changes: Any) -> dict[str, Any]:
    """The optimizer's state dict of `own_training` with changes in its parameter group."""
    state = own_training()["optimizer_state_dict"]
    state["param_groups"][0] |= changes
    return state


def without_moment() -> dict[str, Any]:
    state = own_training()["optimizer_state_dict"]
    del state["state"][4]["exp_avg_sq"]
    state["state"][8]["exp_avg"] = state["state"][8]["exp_avg"][:2]
    state["state"][12]["exp_avg"][0] = float("nan")
    return state


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer_state_dict": broken(betas=(0.8, 0.999))}, "betas is (0.8, 0.999) in the file, (0.9, 0.999)"),
        ({"optimizer_state_dict": broken(amsgrad=True)}, "amsgrad is True; it has no counterpart here"),
        ({"optimizer_state_dict": broken(params=[0, 1])}, "was made for 2 parameters, the model has"),
        ({"optimizer_state_dict": without_moment()}, "exp_avg_sq of std_block.second.weight is missing"),
        ({"optimizer_state_dict": without_moment()}, "has the shape (2,"),
        ({"optimizer_state_dict": without_moment()}, "contains NaN or infinity"),
        ({"optimizer_state_dict": None}, "contains no optimizer"),
        ({"optimizer_state_dict": {"state": {}, "param_groups": []}}, "one parameter group"),
        ({"step": 7}, "step of std_block.first.weight is 2, not 7"),
        ({"step": 9}, "is at step 9, and the configuration ends at train.steps = 8"),
        ({"model_state_dict": Twin(filters=5).state_dict()}, "model.filters is 4 in the configuration, 5 in the file"),
        ({"model_state_dict": Twin(filters=4).double().state_dict()}, "is in float64, but --train.precision float32"),
        ({"model_state_dict": None}, "contains no state dict of a network"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(
    changes: dict[str, Any], message: str, config: Path, tmp_path: Path
) -> None:
    path, run = tmp_path / "own.pth", tmp_path / "run"
    torch.save(own_training(**changes), path)
    with pytest.raises((UserError, DataError)) as failure:
        convert(path, run, config=str(config))
    assert message in str(failure.value)
    assert not run.exists()


def test_options_that_do_not_go_together_are_refused(own: Path, config: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="reads a run folder"):
        convert(own, tmp_path / "a.pth", to_torch_training_state=True)
    with pytest.raises(UserError, match=r"--config is for a \.pth that becomes a run folder"):
        convert(own, tmp_path / "a.safetensors", config=str(config))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.toml").touch()
    with pytest.raises(UserError, match="convert a training run to a new folder"):
        convert(own, tmp_path / "full", config=str(config), force=True)
    with pytest.raises(UserError, match="neither a run folder"):
        convert(tmp_path / "full" / "no", tmp_path / "a.pth", to_torch_training_state=True)


def test_a_run_folder_of_weights_alone_has_no_training_to_convert(own: Path, tmp_path: Path) -> None:
    convert(own, tmp_path / "run")
    with pytest.raises(UserError, match="holds weights only"):
        convert(tmp_path / "run", tmp_path / "a.pth", to_torch_training_state=True)


def test_the_header_of_a_state_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "own.pth"
    torch.save(own_training(pdrunet="{"), path)
    with pytest.raises(UserError, match="not a JSON object"):
        convert(path, tmp_path / "run")
    config = configuration.to_dict(configuration.parse(CONFIG, "tiny"))
    config["optim"]["nmae"] = 1
    torch.save(own_training(pdrunet=json.dumps({"config": config})), path)
    with pytest.raises(UserError, match="nmae"):
        convert(path, tmp_path / "run")
