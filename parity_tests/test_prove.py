"""The harness on a network that is none of this project's: levels 1 to 9, and planted faults with their causes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from parity_tests.example import original, port
from parity_tests.example import pair as example
from parity_tests.example.pair import FIRST, PAIR, make
from parity_tests.support import harness, prove
from parity_tests.support.budget import Budget
from parity_tests.support.case import Case
from parity_tests.support.pair import CONVOLUTION, Layout, Pair, names_of, our_pair
from pdrunet_jax.model import layers
from pdrunet_jax.runtime.errors import RunError, UserError


def standard() -> Budget:
    return Budget(ours=False)


def test_the_port_agrees_from_the_names_to_the_swapped_training() -> None:
    budget, said = standard(), []
    harness.prove(PAIR, budget, said.append, steps=20)
    assert [line.split(":")[0] for line in said] == [f"level {level}" for level in (1, 3, 5, 6, 7, 8, 9)]
    rows = {(row.level, row.comparison): row for row in budget.sorted_rows()}
    assert rows[3, "activations, train"].worst
    assert rows[5, "gradients"].tolerance == 1e-10, "the standard's, not those measured on other networks"
    assert 0 < rows[8, "kernels"].measured < 1e-13
    assert list(harness.walk(PAIR)) == ["stem", "stem_norm", "up", "up_norm", "mix", "head", "output"]


def test_float32_agrees_within_rounding() -> None:
    budget = standard()
    pair = make(dtype="float32")
    harness.outputs(budget, pair, True)
    harness.gradients(budget, pair)
    assert {row.dtype for row in budget.sorted_rows()} == {"float32"}


def broken(change: Callable[[Any], None], kind: type[port.Locator] = port.Locator) -> Pair:
    """The pair with a changed port."""

    def build() -> nnx.Module:
        model = kind(rngs=nnx.Rngs(0))
        change(model)
        return model

    return make(flax=build)


def with_setting(layer: str, name: str, value: Any) -> Pair:
    return broken(lambda model: setattr(getattr(model, layer), name, value))


def three_groups(model: Any) -> None:
    model.up_norm = nnx.GroupNorm(6, num_groups=3, epsilon=1e-5, rngs=nnx.Rngs(0))


def stock_norm(model: Any) -> None:
    model.stem_norm = nnx.BatchNorm(8, momentum=0.9, rngs=nnx.Rngs(0))


def stock_norm_by_default(model: Any) -> None:
    model.stem_norm = nnx.BatchNorm(8, rngs=nnx.Rngs(0))


class Resized(port.Locator):
    smooth = False

    def resize(self, x: jax.Array) -> jax.Array:
        return jax.image.resize(x, (len(x), 7, 7, x.shape[-1]), "bilinear", antialias=self.smooth)


class Smoothed(Resized):
    smooth = True


class ChannelsLast(port.Locator):
    def flatten(self, x: jax.Array) -> jax.Array:
        return x.reshape(len(x), -1)


def nothing(model: Any) -> None:
    pass


NAMES = names_of(original.Locator())
RESIZE = "resize in interpolate, called outside of the layers: it resizes as with"
SWAPPED = {"stem.weight": ("stem.kernel", Layout((3, 2, 1, 0)))}
UP = {"up.weight": ("up.kernel", Layout((2, 3, 0, 1)))}

FORWARD: dict[str, tuple[Pair, str]] = {
    "epsilon of a batch norm": (with_setting("stem_norm", "epsilon", 1e-3), "epsilon in stem_norm (batch_norm)"),
    "epsilon of a group norm": (with_setting("up_norm", "epsilon", 1e-6), "epsilon in up_norm (group_norm): eps is 1e"),
    "groups": (broken(three_groups), "groups in up_norm (group_norm): there are 3 groups, in PyTorch 2"),
    "strided convolution": (with_setting("stem", "padding", "SAME"), "padding in stem (conv2d)"),
    "transposed convolution": (with_setting("up", "padding", "SAME"), "padding of a transposed convolution in up"),
    "mirrored kernel": (make(names=NAMES | UP), "kernel layout in up (conv_transpose2d): its kernel is used mirrored"),
    "swapped sides": (make(names=NAMES | SWAPPED), "kernel layout in stem (conv2d): its kernel is used with height"),
    "align_corners": (broken(nothing, Resized), f"{RESIZE} align_corners=False, PyTorch with align_corners=True"),
    "jax.image.resize": (broken(nothing, Smoothed), f"{RESIZE} align_corners=False, antialias=True, PyTorch with"),
    "flatten order": (broken(nothing, ChannelsLast), "flatten order"),
}  # fmt: skip
"""Faults that show in evaluation: the pair, and what the diagnosis says."""


@pytest.mark.parametrize("fault", FORWARD)
def test_fault_of_the_forward_pass_is_caught_and_its_cause_named(fault: str) -> None:
    pair, cause = FORWARD[fault]
    with pytest.raises(AssertionError, match="level 3") as failure:
        harness.outputs(standard(), pair, False)
    message = str(failure.value)
    assert f"likely cause: {cause}" in message
    assert message.count("likely cause") == 1
    assert message.endswith("With this imitated in PyTorch, the two agree.")


@pytest.mark.parametrize(
    ("pair", "causes"),
    [
        (broken(stock_norm), ["unbiased variance"]),
        (with_setting("stem_norm", "momentum", 0.99), ["momentum"]),
        (broken(stock_norm_by_default), ["momentum", "unbiased variance"]),
    ],
    ids=["biased variance", "momentum", "both, as in nnx.BatchNorm"],
)
def test_fault_of_the_running_statistics_is_caught_and_its_cause_named(pair: Pair, causes: list[str]) -> None:
    harness.outputs(standard(), pair, True)  # nothing else shows it
    with pytest.raises(AssertionError, match="level 6") as failure:
        harness.buffers(standard(), pair)
    found = [line.split(" in ")[0] for line in str(failure.value).splitlines() if line.startswith("likely cause")]
    assert found == [f"likely cause: {cause}" for cause in causes]


@pytest.mark.parametrize(
    ("optimizer", "cause"),
    [
        (optax.chain(optax.add_decayed_weights(1e-2), optax.adam(1e-3, eps=1e-7)), "Adam's epsilon: "),
        (optax.adamw(1e-3, weight_decay=1e-2), "weight decay: the Flax side updates as with weight_decay=0.01, dec"),
        (optax.adam(1e-3), "weight decay: the Flax side updates as with weight_decay=0"),
    ],
    ids=["epsilon", "decoupled decay", "no decay"],
)  # fmt: skip
def test_fault_of_the_optimizer_is_caught_and_its_cause_named(optimizer: Any, cause: str) -> None:
    with pytest.raises(AssertionError, match="level 7") as failure:
        harness.updates(standard(), make(optimizer=optimizer), 20)
    assert f"likely cause: {cause}" in str(failure.value)


def test_fault_of_the_optimizer_shows_in_a_training_too() -> None:
    pair = make(optimizer=optax.adamw(1e-3, weight_decay=1e-2))
    with pytest.raises(AssertionError, match="level 8") as failure:
        harness.trajectory(standard(), pair, 5)
    assert "likely cause: weight decay" in str(failure.value)


def test_loss_that_sums_where_pytorch_averages() -> None:
    pair = make(flax_loss=lambda output, target: ((output - target) ** 2).sum())
    with pytest.raises(AssertionError, match=r"likely cause: reduction of the loss.* are 6 times"):
        harness.gradients(standard(), pair)


def test_every_mistake_of_a_first_draft_is_named_in_one_run() -> None:
    """Two of them are between two observed values, where neither alone explains the difference."""
    with pytest.raises(AssertionError) as failure:
        harness.outputs(standard(), FIRST, False)
    message = str(failure.value)
    found = [line.split(": ")[1].split(" in ")[0] for line in message.splitlines() if line.startswith("likely cause")]
    first = ["padding", "padding of a transposed convolution", "epsilon"]
    assert found[:3] == first
    assert sorted(found[3:]) == ["approximate GELU", "flatten order", "resize"]
    assert message.endswith("With these imitated in PyTorch, the two agree.")


def test_fault_of_every_normalisation_of_our_network_is_one_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "EPSILON", 1e-3)
    with pytest.raises(AssertionError, match=r"first std_block\.bnorm1 ") as failure:
        harness.outputs(Budget(), our_pair(Case(shape=(1, 8, 8))), False)
    assert "likely cause: epsilon in every batch_norm: eps is 0.001" in str(failure.value)
    assert str(failure.value).count("likely cause") == 1


def test_unknown_fault_is_said_to_be_unknown() -> None:
    class Sine(port.Locator):
        def resize(self, x: jax.Array) -> jax.Array:
            return jnp.sin(super().resize(x))

    with pytest.raises(AssertionError, match=r"first mix .*\nNo known cause explains it"):
        harness.outputs(standard(), broken(nothing, Sine), False)


def test_table_that_does_not_fit_is_refused_with_every_problem() -> None:
    names = {name: row for name, row in NAMES.items() if name != "mix.bias"}
    names |= {"stem.weight": ("stem.weight", CONVOLUTION), "head.weight": ("head.kernel", Layout())}
    with pytest.raises(AssertionError) as failure:
        harness.conversion(standard(), make(names=names))
    message = str(failure.value)
    for part in (
        "mix.bias of PyTorch is not in the table",
        "stem.weight of the table",
        "stem.kernel of Flax",
        "(96, 3)",
    ):
        assert part in message


def test_command_proves_a_pair_or_says_what_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "PAIR", FORWARD["epsilon of a batch norm"][0])
    with pytest.raises(RunError, match="likely cause: epsilon"):
        prove.main(["parity_tests.example.pair:PAIR"])
    assert capsys.readouterr().out.startswith("level 1: names and shapes agree")
    for wrong in ("parity_tests.example.pair:PAIRS", "no.such.module:PAIR", "parity_tests.example.pair:make"):
        with pytest.raises(UserError, match=wrong.partition(":")[0]):
            prove.main([wrong])
    with pytest.raises(UserError, match="--steps 1"):
        prove.main(["parity_tests.example.pair:PAIR", "--steps", "1"])
