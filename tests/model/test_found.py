"""Checkpoints as they are found: wrapped, prefixed, beside other objects, under any suffix; and files that are none."""

import argparse
import gzip
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pdrunet_jax.model.load import build_loaded, load_weights
from pdrunet_jax.model.weights import from_public
from pdrunet_jax.runtime.errors import DataError, UserError

torch = pytest.importorskip("torch")

from pdrunet_torch_ref import PDRUNet as Twin  # noqa: E402 - it needs torch

Tensors = dict[str, Any]


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    torch.manual_seed(0)
    state: Tensors = Twin(filters=4).state_dict()
    return state


def prefixed(tensors: Tensors, prefix: str, factor: float = 1.0) -> Tensors:
    return {f"{prefix}{name}": tensor * factor for name, tensor in tensors.items()}


def counts(tensors: Tensors, change: Callable[[Any], Any]) -> Tensors:
    return {name: change(tensor) if "tracked" in name else tensor for name, tensor in tensors.items()}


FOUND: dict[str, tuple[str, Callable[[Tensors], Any], str]] = {
    "DataParallel": (
        "a.pth.tar",
        lambda t: {"epoch": 3, "state_dict": prefixed(t, "module.")},
        "not epoch; .*'module'?",
    ),
    "torch.compile": ("a.PT", lambda t: prefixed(t, "_orig_mod.module."), "the prefix '_orig_mod.module.'"),
    "Lightning": (
        "epoch=3.ckpt",
        lambda t: {
            "state_dict": {**prefixed(t, "net."), "loss_fn.pos_weight": torch.ones(1)},
            "hyper_parameters": argparse.Namespace(lr=1e-3, root=Path("/data")),
            "optimizer_states": [],
        },
        "not hyper_parameters, optimizer_states; removed the prefix 'net.' .*; left out loss_fn.pos_weight",
    ),
    "a bare .bin": ("pytorch_model.bin", lambda t: t, "dropped e5"),
    "two levels of dictionaries": ("a.pth", lambda t: {"a": {"model": t}}, "under 'a.model'"),
    "a loss in the model": ("a.pth", lambda t: {**t, "criterion.weight": torch.ones(2)}, "left out criterion.weight"),
    "an average beside it": (
        "a.pth",
        lambda t: {"ema": prefixed(t, "module.", 2), "net": t},
        "took the weights under 'net', not ema",
    ),
    "an average by prefix": (
        "a.pth",
        lambda t: {**prefixed(t, "ema_net.", 2), **prefixed(t, "net.")},
        "left out ema_net.",
    ),
    "objects of NumPy, argparse, pathlib": (
        "a.pth",
        lambda t: {
            "model": t,
            "dice": np.float64(0.9),
            "epoch": np.int64(3),
            "confusion": np.eye(2, dtype=np.float32),
            "names": np.array(["a", "b"]),
            "args": argparse.Namespace(out=Path("x")),
            "version": torch.__version__,
        },
        "not args, confusion, dice, epoch, names, version",
    ),
    "arrays of NumPy": ("a.pth", lambda t: {name: tensor.numpy() for name, tensor in t.items()}, "dropped e5"),
    "counts that are floating point": ("a.pth", lambda t: counts(t, torch.Tensor.float), "read 26 num_batches_tracked"),
    "counts of shape (1,)": ("a.pth", lambda t: counts(t, lambda n: n.reshape(1)), "read 26 num_batches_tracked"),
    "no counts": ("a.pth", lambda t: {n: x for n, x in t.items() if "tracked" not in n}, "set 26 missing"),
}


@pytest.mark.parametrize("kind", FOUND)
def test_the_network_is_found_and_what_was_left_is_said(
    kind: str, tensors: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, change, said = FOUND[kind]
    torch.save(change(tensors), tmp_path / name)
    loaded = load_weights(tmp_path / name)
    for part in ("std_block.first", "final_conv"):
        kernel = loaded.params
        for key in (*part.split("."), "kernel"):
            kernel = kernel[key]
        np.testing.assert_array_equal(kernel[...].transpose(3, 2, 0, 1), tensors[f"{part}.weight"])
    notes = "; ".join(loaded.notes)
    assert re.search(said, notes), notes
    build_loaded(loaded)
    assert capsys.readouterr().err == "".join(f"{tmp_path / name}: {note}\n" for note in loaded.notes)


def test_the_suffix_does_not_matter(tensors: Tensors, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "a.pth")
    torch.save(tensors, tmp_path / "b.safetensors")
    torch.save(tensors, tmp_path / "c.pkl", _use_new_zipfile_serialization=False)
    for name, said in (("a.pth", "as .safetensors"), ("b.safetensors", "as a file of PyTorch"), ("c.pkl", "e5")):
        loaded = load_weights(tmp_path / name)
        assert said in loaded.notes[0]
        np.testing.assert_array_equal(loaded.params["final_conv"]["bias"][...], tensors["final_conv.bias"])


def test_several_networks_are_not_guessed_from(tensors: Tensors, tmp_path: Path) -> None:
    torch.save({"first": tensors, "second": tensors}, tmp_path / "two.pth")
    with pytest.raises(UserError, match=r"several networks \('first', 'second'\): save the state dict of one"):
        load_weights(tmp_path / "two.pth")


def tar(path: Path, content: bytes) -> None:
    (path.parent / "inside.pth").write_bytes(content)
    with tarfile.open(path, "w") as archive:
        archive.add(path.parent / "inside.pth", "inside.pth")


def npz(path: Path, _: bytes) -> None:
    with path.open("wb") as file:
        np.savez(file, a=np.zeros(3))


def other(text: str) -> Callable[[Path, bytes], None]:
    return lambda path, _: path.write_text(text) and None


NOT_WEIGHTS: dict[str, tuple[Callable[[Path, bytes], Any], str]] = {
    "Git LFS": (
        other("version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n"),
        "Git LFS .* `git lfs pull`",
    ),
    "web page": (other("\n<!DOCTYPE html>\n<html>Sign in</html>"), "a web page: the download needs a login"),
    "refused download": (other("Invalid username or password.\n"), r"text \('Invalid username or password.'\)"),
    "empty": (other(""), "damaged: it is empty"),
    "gzip": (lambda path, data: path.write_bytes(gzip.compress(data)), "`gzip -dc a.pth > weights.pth`"),
    "tar": (tar, "a tar archive of files"),
    "HDF5": (lambda path, _: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(90)), "an HDF5 file"),
    "picture": (lambda path, _: path.write_bytes(b"\x89PNG\r\n" + bytes(90)), "neither .* it begins with b'.x89PNG"),
    "cut off": (lambda path, data: path.write_bytes(data[: len(data) // 2]), "ends too early"),
    ".npz": (npz, "an .npz archive"),
    "TorchScript": (
        lambda path, _: torch.jit.script(torch.nn.ReLU()).save(str(path)),
        r"TorchScript .*torch\.jit\.load",
    ),
    "whole network": (
        lambda path, _: torch.save(Twin(filters=1), path),
        r"whole pickled network \(\S+PDRUNet\).*model\.state",
    ),
    "network in a dictionary": (lambda path, _: torch.save({"model": Twin(filters=1)}, path), "whole pickled network"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", NOT_WEIGHTS)
def test_what_is_no_file_of_weights_is_called_what_it_is(kind: str, tensors: Tensors, tmp_path: Path) -> None:
    torch.save(tensors, tmp_path / "whole.pth")
    write, message = NOT_WEIGHTS[kind]
    write(tmp_path / "a.pth", (tmp_path / "whole.pth").read_bytes())
    with pytest.raises(UserError, match=message) as caught:
        load_weights(tmp_path / "a.pth")
    assert str(caught.value).startswith(f"{tmp_path / 'a.pth'} is ")


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (
            lambda t: {n: x for n, x in t.items() if n[:2] not in ("d4", "d5")},
            "24 of its 158 arrays are missing, in d4, d5:",
        ),
        (lambda t: {**t, "gate.weight": t["final_conv.bias"]}, "it is of a larger network, with gate.weight:"),
        (
            lambda t: {n.replace("d5.first", "d5.c"): x for n, x in t.items()},
            "it is of another network or a changed one: 2 arrays are missing, and there are d5.c.bias, d5.c.weight:",
        ),
    ],
)
def test_the_cause_comes_before_the_list(change: Callable[[Tensors], Tensors], cause: str, tensors: Tensors) -> None:
    with pytest.raises(DataError) as caught:
        from_public({name: tensor.numpy() for name, tensor in change(tensors).items()}, "a.pth")
    assert str(caught.value).startswith(f"a.pth does not hold the weights of a PDR-UNet: {cause}\n  - ")
