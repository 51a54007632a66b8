"""Weights from the public PyTorch layout to every other format and back, bit for bit."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pdrunet_jax import config
from pdrunet_jax.convert import __main__ as command
from pdrunet_jax.convert.__main__ import ConvertOptions, main
from pdrunet_jax.model.load import load_model, load_weights
from pdrunet_jax.runtime.errors import UserError
from tests.support import ROOT

torch = pytest.importorskip("torch")

from pdrunet_torch_ref import TWINS  # noqa: E402 - it needs torch
from pdrunet_torch_ref import PDRUNet as Twin  # noqa: E402
from pdrunet_torch_ref.training import make_loss, train_step  # noqa: E402

SIZES = ((64, 96), (97, 61))


def convert(src: Path, dst: Path, **options: Any) -> list[str]:
    return command.convert(ConvertOptions(src, dst, **options))


def trained_twin(**options: object) -> Twin:
    """The public network of 40 filters after a training step, so that its statistics are not the initial ones."""
    torch.manual_seed(0)
    twin = Twin(**options)
    optimizer = torch.optim.Adam(twin.parameters(), lr=1e-3)
    train_step(twin, optimizer, make_loss("bce", 1), torch.rand(2, 1, 16, 16), torch.ones(2, 16, 16))
    return twin.eval()


@pytest.fixture(scope="module")
def twin() -> Twin:
    return trained_twin()


@pytest.fixture
def public(twin: Twin, tmp_path: Path) -> Path:
    path = tmp_path / "public.pth"
    torch.save(twin.state_dict(), path)
    return path


def test_every_chain_of_formats_keeps_every_live_bit(twin: Twin, public: Path, tmp_path: Path) -> None:
    before = twin.state_dict()
    assert sum(parameter.numel() for parameter in twin.parameters()) == 392_561
    names = ("weights.safetensors", "run", "other.pt")
    for chain, order in enumerate((names, names[::-1], names[1:] + names[:1])):
        source = public
        for name in (*order, "back.pth"):
            target = tmp_path / f"{chain}" / name
            convert(source, target)
            source = target
        after = torch.load(source, weights_only=True)
        assert list(after) == list(before)
        for name, tensor in before.items():
            same = torch.zeros_like(tensor) if name.startswith("e5.") else tensor
            assert after[name].dtype == tensor.dtype
            assert torch.equal(after[name], same), (order, name)
        Twin().load_state_dict(after, strict=True)


@pytest.mark.parametrize("name", ["unet", "fusionnet"])
def test_every_network_keeps_every_bit_and_its_name(name: str, tmp_path: Path) -> None:
    twin = TWINS[name](filters=2, depth=1, up="bilinear_corners")
    torch.save({"net": twin.state_dict(), "epoch": 3}, tmp_path / "a.pth")
    assert any("assumed up = 'bilinear'" in line for line in convert(tmp_path / "a.pth", tmp_path / "b.safetensors"))
    with pytest.raises(UserError, match="has no option shortcut"):
        convert(tmp_path / "a.pth", tmp_path / "c.pth", shortcut="conv1")
    convert(tmp_path / "a.pth", tmp_path / "run", up="bilinear_corners")
    lines = convert(tmp_path / "run" / "checkpoints" / "0", tmp_path / "back.pth")
    assert "read it with --up bilinear_corners" in lines[-1]
    for path in (tmp_path / "run", tmp_path / "run/best.safetensors", tmp_path / "run/checkpoints/0"):
        settings = load_model(path).config
        assert (settings.name, settings.depth, settings.up) == (name, 1, "bilinear_corners")
    after = torch.load(tmp_path / "back.pth", weights_only=True)
    assert all(torch.equal(after[key], tensor) for key, tensor in twin.state_dict().items())
    assert list(after) == list(twin.state_dict())


def test_float64_survives_every_format(tmp_path: Path) -> None:
    twin = Twin(filters=4).double()
    torch.save(twin.state_dict(), tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "run")
    convert(tmp_path / "run" / "checkpoints" / "0", tmp_path / "b.safetensors")
    convert(tmp_path / "b.safetensors", tmp_path / "b.pth")
    after = torch.load(tmp_path / "b.pth", weights_only=True)
    for name, tensor in twin.state_dict().items():
        assert name.startswith("e5.") or torch.equal(after[name], tensor)


@pytest.mark.parametrize("form", ["public.pth", "weights.safetensors", "run", "run/checkpoints/0"])
def test_load_model_agrees_with_pytorch(form: str, twin: Twin, public: Path, tmp_path: Path) -> None:
    if form != "public.pth":
        convert(public, tmp_path / form.split("/")[0])
    model = load_model(tmp_path / form)
    images = np.random.default_rng(0).random((2, 16, 24, 1), np.float32)
    with torch.no_grad():
        want = twin(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(np.asarray(model(jnp.asarray(images))), want, rtol=0, atol=1e-4)


def test_loaded_logits_are_within_the_standard_at_even_and_odd_sizes(tmp_path: Path) -> None:
    """In a process of its own, because JAX's 64-bit mode is one setting for all."""
    twin, wanted = trained_twin(), {}
    for dtype in ("float64", "float32"):
        twin = twin.to(getattr(torch, dtype))
        torch.save(twin.state_dict(), tmp_path / f"{dtype}.pth")
        for height, width in SIZES:
            images = np.random.default_rng(height).random((1, height, width, 1)).astype(dtype)
            np.save(tmp_path / f"{dtype} {height}x{width}.npy", images)
            with torch.no_grad():
                logits = twin(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
            wanted[f"{dtype} {height}x{width}"] = logits.transpose(0, 2, 3, 1)
    program = """
import sys, numpy as np, pdrunet_jax
for name in sys.argv[1:]:
    model = pdrunet_jax.load_model(name.split()[0] + ".pth")
    np.save(name + " logits.npy", np.asarray(model(np.load(name + ".npy"))))
"""
    environment = os.environ | {"JAX_ENABLE_X64": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program, *wanted], env=environment, check=True, cwd=tmp_path)
    for name, want in wanted.items():
        got = np.load(tmp_path / f"{name} logits.npy")
        assert got.dtype == want.dtype
        error, tolerance = np.abs(got - want).max(), 1e-11 if want.dtype == np.float64 else 1e-4
        assert error <= tolerance, f"{name}: {error:.1e}"


def test_a_converted_run_folder_has_what_one_expects(public: Path, tmp_path: Path) -> None:
    convert(public, tmp_path / "run", shortcut="conv1")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "best.safetensors",
        "checkpoints",
        "config.toml",
    ]
    stated = config.load(tmp_path / "run" / "config.toml")
    assert (stated.model.shortcut, stated.model.outputs, stated.model.filters) == ("conv1", 1, 40)
    for source in ("run", "run/checkpoints/0", "run/best.safetensors"):
        assert load_weights(tmp_path / source).options["shortcut"] == "conv1"
    assert load_weights(tmp_path / "run", which="latest").options["shortcut"] == "conv1"


def test_the_wiring_that_a_pth_cannot_state_is_told(public: Path, tmp_path: Path) -> None:
    convert(public, tmp_path / "a.safetensors", shortcut="conv1")
    assert "--shortcut conv1" in convert(tmp_path / "a.safetensors", tmp_path / "b.pth")[-1]
    assert load_weights(tmp_path / "b.pth").options["shortcut"] == "input"


def test_the_command_says_what_it_dropped_and_filled(
    public: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(public), str(tmp_path / "a.safetensors")])
    out = capsys.readouterr().out
    assert "363,521 used parameters" in out
    assert "dropped e5.*: 29,040 parameters" in out
    assert "392,561 parameters, 363,521 of them used" in out
    assert "filled e5.* with zeros: 29,040" in out


def test_nothing_is_overwritten_without_force(public: Path, tmp_path: Path) -> None:
    target, run = tmp_path / "a.safetensors", tmp_path / "run"
    target.write_text("precious")
    convert(public, run)
    for existing in (target, run):
        with pytest.raises(UserError, match="--force"):
            convert(public, existing)
    assert target.read_text() == "precious"
    convert(public, target, force=True)
    convert(public, run, shortcut="conv1", force=True)
    assert load_weights(target).options["shortcut"] == "input"
    assert load_weights(run).options["shortcut"] == "conv1"


def test_a_folder_with_more_than_weights_is_never_replaced(public: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    convert(public, run)
    (run / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        convert(public, run, force=True)
    assert (run / "metrics.jsonl").exists()


def test_a_source_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "bad.pth").write_bytes(b"not weights")
    (tmp_path / "a.safetensors").write_text("precious")
    for target in ("a.safetensors", "run", "b.pth"):
        with pytest.raises(UserError):
            convert(tmp_path / "bad.pth", tmp_path / target, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "bad.pth"]
    assert (tmp_path / "a.safetensors").read_text() == "precious"


def test_bad_targets_are_user_errors(public: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a name without suffix"):
        convert(public, tmp_path / "weights.onnx")
    with pytest.raises(UserError, match="is the file to read itself"):
        convert(public, public, force=True)
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        convert(public, tmp_path / "folder.pth", force=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        convert(public, tmp_path / "file", force=True)


def test_the_command_exits_with_2_and_one_message(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pdrunet_jax.convert", str(tmp_path / "none.pth"), str(tmp_path / "a.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path / 'none.pth'}: there is no such file or folder\n"
