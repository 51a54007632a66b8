import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save

from pdrunet_jax.model.files import read_weights, write_pth, write_safetensors
from pdrunet_jax.model.load import load_model, load_weights
from pdrunet_jax.model.weights import from_public, to_public
from pdrunet_jax.runtime.errors import DataError, RunError, UserError
from tests.support.tiny import network

torch = pytest.importorskip("torch")

Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def public() -> Arrays:
    """A state dict in the public layout, `e5` included, with 4 filters."""
    return public_arrays()


def public_arrays(dtype: str = "float32", **options: Any) -> Arrays:
    model = network(**{"filters": 4, **options})
    arrays = to_public(nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat))
    rng = np.random.default_rng(0)
    for name, array in arrays.items():
        if name.startswith("e5.") and array.dtype.kind == "f":
            arrays[name] = rng.random(array.shape, np.float32)
    return {name: array.astype(dtype) if array.dtype.kind == "f" else array for name, array in arrays.items()}


def test_every_wrong_key_is_named_in_one_message(public: Arrays) -> None:
    arrays = dict(public)
    del arrays["e1.first.weight"], arrays["d5.bnorm2.running_var"]
    arrays["e2.first.weight"] = arrays["e2.first.weight"][:, :, :2]
    arrays["e3.first.bias"] = arrays["e3.first.bias"].astype(np.int32)
    arrays["e4.bnorm1.num_batches_tracked"] = np.zeros(3, np.float32)
    arrays["d1.first.bias"] = arrays["d1.first.bias"] * np.nan
    arrays["conv.weight"] = arrays["e5.typo"] = np.zeros(3, np.float32)
    with pytest.raises(DataError, match=r"^best\.pth does not hold the weights of a PDR-UNet") as caught:
        from_public(arrays, "best.pth")
    assert set(caught.value.problems) == {
        "e1.first.weight is missing; its shape should be (4, 4, 3, 3)",
        "d5.bnorm2.running_var is missing; its shape should be (4,)",
        "e2.first.weight has the shape (4, 4, 2, 3); it should be (4, 4, 3, 3)",
        "e3.first.bias is int32; it should be float32 or float64",
        "e4.bnorm1.num_batches_tracked has the shape (3,); it should be ()",
        "d1.first.bias holds NaN or infinity: its training diverged",
        "conv.weight is unused: PDR-UNet has no such array",
        "e5.typo is unused: PDR-UNet has no such array",
    }


def test_weights_of_another_network_are_an_error_and_no_crash() -> None:
    with pytest.raises(DataError, match=r"of another network, with arrays named layer1\.0\.conv1\.weight:\n"):
        from_public({"layer1.0.conv1.weight": np.zeros((64, 64, 3, 3), np.float32), "epoch": 3}, "resnet.pth")
    with pytest.raises(DataError, match=r"holds no arrays:\n  - std_block\.first\.weight is missing") as caught:
        from_public({}, "empty.pth")
    assert len(caught.value.problems) == 21


def test_mixed_precision_in_one_file_is_an_error(public: Arrays) -> None:
    arrays = public | {"e1.first.bias": public["e1.first.bias"].astype(np.float64)}
    with pytest.raises(DataError, match="mix float32 and float64"):
        from_public(arrays, "best.pth")


def test_wrappers_and_prefixes_are_removed_and_said(public: Arrays) -> None:
    arrays = {"epoch": 3, "model_state_dict": {f"module._orig_mod.{name}": array for name, array in public.items()}}
    imported = from_public(arrays, "best.pth")
    assert imported.notes[:2] == (
        "took the weights under 'model_state_dict', not epoch",
        "removed the prefix 'module._orig_mod.' from every name",
    )
    back = to_public(imported.params, imported.stats)
    assert all(np.array_equal(back[name], array) for name, array in public.items() if not name.startswith("e5."))


def test_the_dead_block_is_dropped_with_a_note_and_filled_with_zeros(public: Arrays) -> None:
    imported = from_public(public, "best.pth")
    assert imported.notes == ("dropped e5.*: 312 parameters of a block that the network never calls",)
    written = to_public(imported.params, imported.stats)
    assert list(written) == list(public)
    assert not any(written[name].any() for name in written if name.startswith("e5."))
    assert not any(name.startswith("e5.") for name in to_public(imported.params, imported.stats, dead_block=False))
    without = {name: array for name, array in public.items() if not name.startswith("e5.")}
    assert from_public(without, "best.pth").notes == ()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_half_precision_is_widened_exactly(suffix: str, tmp_path: Path, public: Arrays) -> None:
    path = tmp_path / f"half{suffix}"
    half = {name: torch.from_numpy(array.copy()) for name, array in public.items()}
    half = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in half.items()}
    if suffix == ".pth":
        torch.save(half, path)
    else:
        from safetensors.torch import save_file

        save_file(half, path)
    loaded = load_weights(path)
    assert "widened" in " ".join(loaded.notes)
    kernel = loaded.params["e1"]["first"]["kernel"][...]
    np.testing.assert_array_equal(kernel.transpose(3, 2, 0, 1), half["e1.first.weight"].float().numpy())


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.target, "executed")


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_with_code_is_refused_and_nothing_runs(writer: str, tmp_path: Path) -> None:
    target, path = tmp_path / "executed", tmp_path / "evil.pth"
    if writer == "torch":
        torch.save({"e1.first.weight": Malicious(target)}, path)
    else:
        path.write_bytes(pickle.dumps({"e1.first.weight": Malicious(target)}, protocol=2))
    with pytest.raises(UserError, match=r"evil\.pth is refused: .* could run code"):
        load_model(path)
    assert not target.exists()


def test_a_whole_pickled_model_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(torch.nn.Conv2d(1, 1, 1), path)
    with pytest.raises(UserError, match=r"Save `model\.state_dict\(\)`, not the model itself"):
        read_weights(path)


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 truncated"], ids=["empty", "text", "zip"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_damaged_file_is_one_message(suffix: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"damaged{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        load_model(path)


def test_truncated_files_are_one_message(tmp_path: Path, public: Arrays) -> None:
    for path in (tmp_path / "a.pth", tmp_path / "a.safetensors"):
        if path.suffix == ".pth":
            write_pth(path, public)
        else:
            write_safetensors(path, public, {})
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(UserError, match=str(path)):
            load_model(path)


def test_other_sources_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        load_model(tmp_path / "none.pth")
    with pytest.raises(UserError, match="is not a run folder"):
        load_model(tmp_path)
    (tmp_path / "weights.h5").write_bytes(b"x")
    with pytest.raises(UserError, match=r"neither a \.safetensors nor a PyTorch file"):
        load_model(tmp_path / "weights.h5")
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    with pytest.raises(UserError, match="a state dict"):
        load_model(tmp_path / "list.pth")


@pytest.mark.parametrize("header", ["no JSON", "[1]"])
def test_a_broken_header_is_a_user_error(header: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(save({"x": np.zeros(1, np.float32)}, metadata={"pdrunet": header}))
    with pytest.raises(UserError, match="options in its header"):
        read_weights(path)


def test_options_travel_in_the_header(tmp_path: Path) -> None:
    options = {"shortcut": "conv1", "dropout": 0.1, "size": [64, 96], "class_names": ["bone"]}
    write_safetensors(tmp_path / "a.safetensors", public_arrays(outputs=2, in_channels=3, norm="none"), options)
    assert load_weights(tmp_path / "a.safetensors").options == options | {
        "name": "pdrunet",
        "outputs": 2,
        "in_channels": 3,
        "filters": 4,
        "norm": "none",
    }
    model = load_model(tmp_path / "a.safetensors")
    assert (model.config.shortcut, model.config.dropout, model.outputs, model.in_channels) == ("conv1", 0.1, 2, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filters": 8}, "filters is stated as 8, but the arrays show 4"),
        ({"shortcut": "conv2"}, "shortcut is stated as 'conv2'"),
        ({"dropout": "much"}, "dropout is stated as 'much'"),
    ],
)
def test_a_header_that_contradicts_the_arrays_is_an_error(
    options: dict[str, Any], message: str, tmp_path: Path, public: Arrays
) -> None:
    write_safetensors(tmp_path / "a.safetensors", public, options)
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / "a.safetensors")


def test_a_pth_is_of_the_public_wiring_unless_said(tmp_path: Path, public: Arrays) -> None:
    write_pth(tmp_path / "a.pth", public)
    assert load_model(tmp_path / "a.pth").config.shortcut == "input"
    assert load_model(tmp_path / "a.pth", shortcut="conv1").config.shortcut == "conv1"
    write_safetensors(tmp_path / "a.safetensors", public, {"shortcut": "input"})
    with pytest.raises(UserError, match="leave the option 'conv1' out"):
        load_model(tmp_path / "a.safetensors", shortcut="conv1")


def test_float64_weights_load_as_float32_unless_jax_has_64_bits(tmp_path: Path) -> None:
    write_pth(tmp_path / "a.pth", public_arrays("float64"))
    assert load_model(tmp_path / "a.pth").e1.first.kernel[...].dtype == jnp.float32
    assert load_weights(tmp_path / "a.pth").params["e1"]["first"]["kernel"][...].dtype == np.float64
    with pytest.raises(UserError, match="JAX_ENABLE_X64"):
        load_model(tmp_path / "a.pth", param_dtype=jnp.float64)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, public: Arrays) -> None:
    path = tmp_path / "folder.safetensors"
    path.mkdir()  # cannot be replaced by a file
    with pytest.raises(RunError, match="cannot be written"):
        write_safetensors(path, public, {})
    assert [item.name for item in tmp_path.iterdir()] == ["folder.safetensors"]


def test_misshapen_state_cannot_be_written() -> None:
    model = network(filters=4)
    params, stats = (nnx.to_pure_dict(nnx.state(model, kind)) for kind in (nnx.Param, nnx.BatchStat))
    del params["e1"]["first"]["bias"]
    params["e2"]["first"]["bias"] = jnp.zeros(5)
    params["e9"] = {"kernel": jnp.zeros(1)}
    with pytest.raises(DataError) as caught:
        to_public(params, stats)
    assert set(caught.value.problems) == {
        "e1.first.bias is missing; its shape should be (4,)",
        "e2.first.bias has the shape (5,); it should be (4,)",
        "e9.kernel is unused: PDR-UNet has no such array",
    }


def test_without_torch_a_pth_names_the_extra_and_safetensors_load(tmp_path: Path, public: Arrays) -> None:
    write_pth(tmp_path / "a.pth", public)
    write_safetensors(tmp_path / "a.safetensors", public, {})
    program = f"""
import sys
sys.modules["torch"] = None  # what `import torch` finds where it is not installed: ImportError
import pdrunet_jax
from pdrunet_jax.runtime.errors import UserError
from tests.support.tiny import network
pdrunet_jax.load_model({str(tmp_path / "a.safetensors")!r})
try:
    pdrunet_jax.load_model({str(tmp_path / "a.pth")!r})
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "pip install -e '" in done.stdout
    assert "[torch]'" in done.stdout


def test_the_header_is_one_json_string(tmp_path: Path, public: Arrays) -> None:
    write_safetensors(tmp_path / "a.safetensors", public, {"shortcut": "input"})
    data = (tmp_path / "a.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert json.loads(header["__metadata__"]["pdrunet"]) == {"shortcut": "input"}
