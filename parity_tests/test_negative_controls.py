"""Negative controls: every known porting mistake must make its check fail. A suite that cannot fail proves nothing."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from PIL import Image

from parity_tests.support.budget import TOLERANCES, Budget, standard
from parity_tests.support.case import Arrays, Case, make_images, make_masks
from parity_tests.support.cases import DTYPES, HERE
from parity_tests.support.compare import (
    compare_buffers,
    compare_gradients,
    compare_initialisation,
    compare_outputs,
    compare_paths,
    compare_updates,
    largest,
)
from parity_tests.support.jax_side import jax_pass, make_flax
from parity_tests.support.torch_side import make_twin, nchw, state_arrays, twin_pass
from parity_tests.test_conversion import differences
from parity_tests.test_execution_paths import compute_outcome, outcome
from parity_tests.test_layers import compare_batch_norm, initial_model, initial_twin
from parity_tests.test_losses import compare_loss, make_data
from parity_tests.test_optimizers import updates_in_jax, updates_in_torch
from pdrunet_jax.config import OptimConfig
from pdrunet_jax.model import layers
from pdrunet_jax.model.fast import native
from pdrunet_jax.model.network import PDRUNet
from pdrunet_jax.train.optim import make_optimizer
from pdrunet_torch_ref import PDRUNet as Twin

LOOSE = ("float32",)
"""For gross errors: an error above the float32 tolerance is above the float64 tolerance too."""

SMALL = Case(shape=(2, 8, 8))


def both(case: Case, model: PDRUNet, twin: Twin, *, train: bool, loss: Any = None, their_loss: Any = None) -> Any:
    images, masks = make_images(case), make_masks(case) if train else None
    got = jax_pass(model, images, train=train, masks=masks, loss=loss, how="op by op")  # compiled once for all
    return got, twin_pass(twin, images, train=train, masks=masks, loss=their_loss or loss)


def intact(case: Case) -> tuple[PDRUNet, Twin]:
    twin = make_twin(case)
    return make_flax(state_arrays(twin), case), twin


def with_arrays(case: Case, change: Callable[[Arrays], None]) -> tuple[PDRUNet, Twin]:
    """A Flax model with changed weights, and the twin with the original ones."""
    twin = make_twin(case)
    arrays = state_arrays(twin)
    change(arrays)
    return make_flax(arrays, case), twin


@pytest.mark.parametrize("dtype", DTYPES)
def test_biased_running_variance(dtype: str, caught: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = SMALL.replace(dtype=dtype)

    def track(self: layers.BatchNorm, mean: jax.Array, var: jax.Array, pixels: int) -> None:
        original(self, mean, var * ((pixels - 1) / pixels), pixels)

    original = layers.BatchNorm.track
    monkeypatch.setattr(layers.BatchNorm, "track", track)
    passes = both(case, *intact(case), train=True)
    compare_outputs(Budget(), case, "train", *passes)  # nothing else shows it
    assert "running variance" in caught(compare_buffers, case, *passes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_momentum_of_flax(dtype: str, caught: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = SMALL.replace(dtype=dtype)
    monkeypatch.setattr(layers, "MOMENTUM", 0.01)  # 0.99 as nnx.BatchNorm counts it
    assert "running mean" in caught(compare_buffers, case, *both(case, *intact(case), train=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_epsilon_of_1e_3(dtype: str, caught: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = SMALL.replace(dtype=dtype)
    monkeypatch.setattr(layers, "EPSILON", 1e-3)
    message = caught(compare_outputs, case, "eval", *both(case, *intact(case), train=False))
    assert "first std_block.bnorm1 " in message


@pytest.mark.parametrize("dtype", LOOSE)
def test_square_kernel_transposed(dtype: str, caught: Any) -> None:
    case = SMALL.replace(dtype=dtype)

    def transpose(arrays: Arrays) -> None:  # no shape gives it away
        arrays["e2.second.weight"] = arrays["e2.second.weight"].swapaxes(0, 1)

    message = caught(compare_outputs, case, "eval", *both(case, *with_arrays(case, transpose), train=False))
    assert "first e2.second " in message


@pytest.mark.parametrize("dtype", LOOSE)
def test_height_and_width_swapped(dtype: str, caught: Any) -> None:
    case = SMALL.replace(dtype=dtype)

    def swap(arrays: Arrays) -> None:
        for name in arrays:
            if arrays[name].ndim == 4:
                arrays[name] = arrays[name].swapaxes(2, 3)

    message = caught(compare_outputs, case, "eval", *both(case, *with_arrays(case, swap), train=False))
    assert "first std_block.first " in message


@pytest.mark.parametrize("dtype", LOOSE)
def test_initialiser_of_flax(dtype: str, caught: Any) -> None:
    arrays = dict(initial_model(dtype))
    for number, name in enumerate(arrays):
        if arrays[name].ndim == 4:
            shape = tuple(arrays[name].shape[axis] for axis in (2, 3, 1, 0))
            conv = nnx.Conv(*shape[2:], shape[:2], param_dtype=jnp.dtype(dtype), rngs=nnx.Rngs(number))
            arrays[name] = np.asarray(conv.kernel[...]).transpose(3, 2, 0, 1)
    assert "first weight " in caught(compare_initialisation, dtype, arrays, initial_twin())


@pytest.mark.parametrize("dtype", LOOSE)
def test_biases_initialised_with_zero(dtype: str, caught: Any) -> None:
    arrays = {
        name: np.zeros_like(array) if name.endswith(("first.bias", "second.bias")) else array
        for name, array in initial_model(dtype).items()
    }
    assert "first bias " in caught(compare_initialisation, dtype, arrays, initial_twin())


@pytest.mark.parametrize("dtype", LOOSE)
@pytest.mark.parametrize(("block", "dilation"), [("e1", 3), ("e3", 7), ("d5", 2)])
def test_dilation_off_by_one(block: str, dilation: int, dtype: str, caught: Any) -> None:
    case = SMALL.replace(dtype=dtype, shape=(1, 12, 20))
    model, twin = intact(case)
    getattr(model, block).dilation = dilation
    message = caught(compare_outputs, case, "eval", *both(case, model, twin, train=False))
    assert f"first {block}.first " in message


@pytest.mark.parametrize("dtype", LOOSE)
def test_residual_dropped_in_one_block(dtype: str, caught: Any) -> None:
    case = SMALL.replace(dtype=dtype)
    model, twin = intact(case)
    model.d2.shortcut = "none"
    message = caught(compare_outputs, case, "eval", *both(case, model, twin, train=False))
    assert "first d2 " in message


@pytest.mark.parametrize("dtype", LOOSE)
def test_long_skip_dropped(dtype: str, caught: Any) -> None:
    case = SMALL.replace(dtype=dtype)
    model, _ = intact(case)
    broken = make_twin(case)
    # u3 = d3(u2 + x2) + u2 loses u2 again before it reaches d4.
    u2: list[torch.Tensor] = []
    broken.d2.register_forward_hook(lambda _, inputs, output: u2.append(output))
    broken.d4.register_forward_pre_hook(lambda _, inputs: (inputs[0] - u2[-1],))
    message = caught(compare_outputs, case, "eval", *both(case, model, broken, train=False))
    assert "first d4.first " in message


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_dropped_before_batch_norm(dtype: str, caught: Any) -> None:
    case = SMALL.replace(dtype=dtype)
    model, twin = intact(case)
    for name in ("e1", "bottleneck_2"):
        conv = getattr(model, name).first
        conv.bias[...] = jnp.zeros_like(conv.bias[...])
    got, want = both(case, model, twin, train=True)
    # In training the normalisation removes the bias: the logits agree, and only the running mean shows it.
    assert largest(got.logits, want.logits) / np.abs(want.logits).max() < (1e-11 if dtype == "float64" else 1e-4)
    message = caught(compare_buffers, case, got, want)
    assert "running mean" in message
    assert "first e1.bnorm1.running_mean " in message


@pytest.mark.parametrize("dtype", LOOSE)
def test_gradient_stopped_at_a_residual(dtype: str, caught: Any) -> None:
    case = SMALL.replace(dtype=dtype)
    model, _ = intact(case)
    broken = make_twin(case)

    def forward(x: torch.Tensor) -> torch.Tensor:
        block = broken.e4
        inner = torch.relu(block.bnorm1(block.first(x)))
        return torch.relu(block.bnorm2(block.second(inner)) + x.detach())

    broken.e4.forward = forward  # type: ignore[method-assign]
    passes = both(case, model, broken, train=True, loss=lambda logits: (logits**2).mean())
    compare_outputs(Budget(), case, "train", *passes)  # the forward pass is right
    assert "level 5, gradients" in caught(compare_gradients, case, *passes)


@pytest.mark.parametrize("dtype", LOOSE)
def test_ignored_pixels_counted_in_the_loss(dtype: str, caught: Any) -> None:
    logits, objective = make_data("bce", 1, dtype, "ignored")
    counted = dataclasses.replace(objective, valid=np.ones_like(objective.valid))
    message = caught(compare_loss, dtype, counted, objective, logits, "ignored")
    assert "level 4, loss" in message


def test_resize_without_antialiasing(caught: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (97, 61), np.uint8)
    want = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR))
    tensor = nchw(pixels[None, :, :, None].astype(np.float32))
    plain = torch.nn.functional.interpolate(tensor, (32, 32), mode="bilinear")[0, 0].round().to(torch.uint8).numpy()

    def compare(budget: Budget) -> None:
        error = largest(plain.astype(np.float64), want.astype(np.float64))
        budget.hold(4, "preprocessing", "float32", {"resize": error})

    assert "preprocessing" in caught(compare)


def test_names_of_the_two_convolutions_swapped(caught: Any) -> None:
    before = state_arrays(make_twin(SMALL))

    def swapped(name: str) -> str:
        return name.replace("first", "?").replace("second", "first").replace("?", "second") if "e2." in name else name

    after = {swapped(name): array for name, array in before.items()}  # no shape gives it away

    def compare(budget: Budget) -> None:
        budget.hold(1, "torch -> JAX -> torch", "float64", differences(after, before))

    assert "first e2.first.weight " in caught(compare)


@pytest.mark.parametrize("dtype", DTYPES)
def test_variance_as_mean_of_squares(dtype: str, caught: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with Flax's `use_fast_variance`, for a mean far from zero; how far, is for tolerances of other devices too."""

    def fast(z: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean = z.mean((0, 1, 2))
        return mean, jnp.maximum((z * z).mean((0, 1, 2)) - mean * mean, 0)

    monkeypatch.setattr(layers, "moments", fast)
    assert "batch norm, train" in caught(
        compare_batch_norm, {"float32": 1e3, "float64": 1e5}[dtype], 1.0, "plain", True, dtype
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_decay_that_optax_gives_adamw_by_default(dtype: str, caught: Any) -> None:
    want = updates_in_torch(OptimConfig(name="adamw", weight_decay=0.01), dtype)  # torch's own default
    got = updates_in_jax(optax.adamw(1e-3), dtype)
    assert "level 7, updates" in caught(compare_updates, dtype, got, want, "adamw")


def test_decay_of_adamw_as_a_penalty(caught: Any) -> None:
    want = updates_in_torch(OptimConfig(name="adamw", weight_decay=0.01), "float64")
    got = updates_in_jax(make_optimizer(OptimConfig(name="adam", weight_decay=0.01), 100), "float64")
    assert "level 7, updates" in caught(compare_updates, "float64", got, want, "adamw")


def test_clipping_of_optax(caught: Any) -> None:
    """optax divides by the norm, torch by the norm plus 1e-6."""
    config = OptimConfig(clip_norm=1.0, name="sgd", learning_rate=0.1, momentum=0.0)
    got = updates_in_jax(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), "float64")
    want = updates_in_torch(config, "float64")
    assert "level 7, updates" in caught(compare_updates, "float64", got, want, "clipped")


def test_kernel_mirrored_on_one_path(caught: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(filters=4, shape=(1, 32, 32), norm="none", dtype="float32")
    want = outcome(case, train=False)
    original = layers.convolve
    monkeypatch.setattr(
        layers, "convolve", lambda x, kernel, spacing: original(x, kernel[::-1], spacing)
    )  # as in a true convolution
    got = compute_outcome(case.replace(path="polyphase"), train=False)
    assert "level 10" in caught(compare_paths, "convolution path", "float32", case, got, want, "polyphase")


@pytest.mark.skipif("native" not in HERE, reason="the compiled kernels are not there")
@pytest.mark.parametrize("fault", ["row", "shift", "slope"])
def test_fault_in_the_compiled_kernels(fault: str, caught: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operand that reaches them wrongly: a mirrored kernel, a normalisation's shift, a gradient's slope."""
    case = Case(filters=4, shape=(1, 32, 32))
    original = native._operands

    def operands(*given: Any, **options: Any) -> Any:
        found = original(*given, **options)
        for place, operand in enumerate(found):
            if fault == "row" and operand.ndim == 4 and operand.shape[:2] == (3, 3):
                found[place] = operand[::-1]
            if operand.shape == ({"shift": 3, "slope": 4}.get(fault), 4):
                found[place] = operand.at[2].mul(1.01)
        return found

    want = outcome(case)
    monkeypatch.setattr(native, "_operands", operands)
    got = compute_outcome(case.replace(path="native"))
    assert "level 10" in caught(compare_paths, "convolution path", "float64", case, got, want, fault)


def test_no_tolerance_is_looser_than_the_standard() -> None:
    for (level, comparison), tolerance in TOLERANCES.items():
        if comparison == "learning rate":
            continue  # computed in float32 for either dtype
        assert tolerance[0] <= standard(level, comparison)[0], comparison
        assert tolerance[1] <= standard(level, comparison)[1], comparison
