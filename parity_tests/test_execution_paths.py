"""Level 10: every way to carry out the network against the plain one."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from parity_tests.support.budget import Budget
from parity_tests.support.case import Arrays, Case, make_images, make_masks, make_objective
from parity_tests.support.cases import DTYPES, HERE, state_of
from parity_tests.support.compare import compare_paths
from parity_tests.support.jax_side import compiled, loss_of, make_flax
from pdrunet_jax.config import LossConfig
from pdrunet_jax.model.execution import Execution
from pdrunet_jax.model.fast import native_library, winograd, xla
from pdrunet_jax.model.layers import split_state
from pdrunet_jax.model.weights import to_public
from pdrunet_jax.train.losses import make_loss
from pdrunet_jax.train.step import accumulate

NETWORKS = (
    Case(shape=(2, 64, 32)),
    Case(shape=(1, 24, 40), shortcut="conv1", outputs=2, in_channels=3),
    Case(shape=(2, 32, 32), norm="none"),
    Case(shape=(1, 96, 32)),  # as many phases as the largest dilation
)

# Every network in float64, where a mistake cannot hide. Level 3 compares both paths with PyTorch in float32 as well.
ON_PATHS = [(case, path) for case in (*NETWORKS, NETWORKS[0].replace(dtype="float32")) for path in HERE[1:]]


def compute_outcome(
    case: Case,
    compute: str | None = None,
    *,
    train: bool = True,
    remat: bool = False,
    mesh: Mesh | None = None,
    run: Any = compiled,
) -> Arrays:
    """Return logits, and in training loss, gradients and new buffers; `compute` is the dtype of the convolutions."""
    model = make_flax(state_of(case), case, dtype=compute)
    graph, params, stats = split_state(model)
    execution = Execution.of(case.path, remat=remat, mesh=mesh)
    images, masks, objective = make_images(case), make_masks(case), make_objective(case)

    def evaluate(params: nnx.State, stats: nnx.State) -> jax.Array:
        return nnx.merge(graph, params, stats)(images, execution=execution)

    def forward(params: nnx.State, stats: nnx.State) -> Any:
        model = nnx.merge(graph, params, stats, copy=True)
        keep = [jnp.asarray(mask) for mask in masks]
        logits = model(images, train=True, dropout_masks=keep, execution=execution)
        return loss_of(objective)(logits), (logits, nnx.state(model, nnx.BatchStat))

    if not train:
        return {"logits": np.asarray(run(evaluate)(params, stats))}
    (loss, (logits, stats)), gradients = run(jax.value_and_grad(forward, has_aux=True))(params, stats)
    arrays = to_public(gradients, stats, dead_block=False)
    return {"loss": np.asarray(loss), "logits": np.asarray(logits), **arrays}


outcome = cache(compute_outcome)


def test_the_native_path_is_compared() -> None:
    if (reason := native_library.problem()) is not None:
        pytest.skip(f"nothing is known of the native path: {reason}")
    assert "native" in HERE


@pytest.mark.parametrize(("case", "path"), ON_PATHS, ids=str)
def test_every_path_agrees_with_the_plain_one(case: Case, path: str, budget: Budget) -> None:
    for train in (False, True):
        got, want = outcome(case.replace(path=path), train=train), outcome(case, train=train)
        compare_paths(budget, "convolution path", case.dtype, case, got, want, f"{path} {case}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_evaluation_in_chunks_agrees_with_the_plain_path(
    dtype: str, budget: Budget, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = NETWORKS[0].replace(dtype=dtype)
    monkeypatch.setattr(xla, "CHUNK_PIXELS", 256)  # less than a batch of any layout, more than a phase
    got = compute_outcome(case.replace(path="fused"), train=False)
    compare_paths(budget, "convolution path", dtype, case, got, outcome(case, train=False), f"chunks {case}")


@pytest.mark.parametrize(
    ("norm", "strip", "dtype"),
    [("batch", 64, "float64"), ("batch", 512, "float32"), ("none", 512, "float64"), ("none", 64, "float32")],
)
def test_winograd_convolutions_agree_with_the_plain_path(
    norm: str, strip: int, dtype: str, budget: Budget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In strips of rows and of several phases; in evaluation, and in training where there is no normalisation."""
    case = Case(filters=8, shape=(1, 32, 48), norm=norm, dtype=dtype)
    monkeypatch.setattr(winograd, "MIN_CHANNELS", case.filters)
    monkeypatch.setattr(winograd, "MIN_PIXELS", 0)
    monkeypatch.setattr(winograd, "STRIP_PIXELS", strip)
    for train in (False, True) if (norm, dtype) == ("none", "float64") else (False,):
        got = compute_outcome(case.replace(path="fused"), train=train)
        compare_paths(budget, "convolution path", dtype, case, got, outcome(case, train=train), f"Winograd {case}")


@pytest.mark.parametrize(
    ("path", "dtype"), [("plain", "float64"), ("polyphase", "float64"), ("fused", "float32"), (HERE[-1], "float64")]
)
def test_rematerialisation_changes_nothing(path: str, dtype: str, budget: Budget) -> None:
    case = NETWORKS[0].replace(dtype=dtype, path=path)
    compare_paths(budget, "rematerialisation", dtype, case, outcome(case, remat=True), outcome(case), str(case))


@pytest.mark.parametrize(("path", "remat"), [("plain", False), ("polyphase", False), ("fused", True)])
def test_bfloat16_agrees_with_float32(path: str, remat: bool, budget: Budget) -> None:
    case = NETWORKS[0].replace(dtype="float32", filters=8)  # with fewer filters one rounded sum weighs more
    got, want = outcome(case.replace(path=path), "bfloat16", remat=remat), outcome(case)
    assert got["e1.bnorm1.running_var"].dtype == got["e1.first.weight"].dtype == got["logits"].dtype == np.float32
    compare_paths(budget, "bfloat16", "float32", case, got, want, f"{path} {case}")


def accumulated(case: Case, parts: int, compute: str | None = None, *, remat: bool = False) -> Arrays:
    """Return loss, logits and gradients of a batch taken in parts; without dropout, whose masks depend on the part."""
    case = case.replace(dropout=0.0)
    graph, params, stats = split_state(make_flax(state_of(case), case, dtype=compute))
    execution = Execution.of(case.path, remat=remat)
    objective = make_objective(case)
    valid = np.ones_like(objective.valid)  # so that the mean over the parts' pixels is the mean over the batch's
    data = tuple(jnp.asarray(array) for array in (make_images(case), objective.target, valid))
    loss = make_loss(LossConfig(name="bce_dice"), 1)
    run = compiled(lambda p, s: accumulate(graph, execution, loss, (p, s), data, jax.random.key(0), parts))
    value, logits, gradients, stats = run(params, stats)
    arrays = to_public(gradients, stats, dead_block=False)
    return {"loss": np.asarray(value), "logits": np.asarray(logits), **arrays}


@pytest.mark.parametrize(
    ("path", "dtype", "compute", "remat"),
    [
        ("plain", "float64", None, False),
        ("fused", "float32", None, True),
        ("polyphase", "float32", "bfloat16", False),
    ],
)
def test_accumulated_gradients_are_the_gradients_of_the_whole_batch(
    path: str, dtype: str, compute: str | None, remat: bool, budget: Budget
) -> None:
    """Without normalisation: with it, the statistics are of a part, in PyTorch as well."""
    case = Case(norm="none", shape=(4, 32, 32), dtype=dtype, path=path)
    got, want = accumulated(case, 4, compute, remat=remat), accumulated(case, 1, compute)
    where = f"{'rematerialised ' if remat else ''}{case}"
    compare_paths(budget, compute or "accumulation", dtype, case, got, want, where)
