"""Level 10: every way to carry the network out, against the plain one."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from parity_tests.support.budget import Budget
from parity_tests.support.case import Arrays, Case, Objective, make_images, make_masks, make_objective
from parity_tests.support.cases import DTYPES, state_of
from parity_tests.support.compare import compare_paths
from parity_tests.support.jax_side import compiled, loss_of
from pdrunet_jax.config import LossConfig
from pdrunet_jax.model.execution import Execution
from pdrunet_jax.model.fast import winograd
from pdrunet_jax.model.fast import xla as parts
from pdrunet_jax.model.network import PDRUNet
from pdrunet_jax.model.weights import from_public, to_public
from pdrunet_jax.train.losses import make_loss
from pdrunet_jax.train.step import accumulate

NETWORKS = (
    Case(filters=8, shape=(2, 64, 32)),
    Case(filters=8, shape=(1, 24, 40), shortcut="conv1", outputs=2, in_channels=3),
    Case(filters=8, shape=(2, 32, 32), norm="none"),
    Case(filters=4, shape=(1, 96, 32)),  # as many phases as the largest dilation
)


@cache
def outcome(
    case: Case, compute: str | None = None, train: bool = True, remat: bool = False, mesh: Mesh | None = None
) -> Arrays:
    """Logits, and in training loss, gradients and new buffers; `compute` is the dtype of the convolutions."""
    imported = from_public(state_of(case), "the twin")
    dtype = jnp.dtype(case.dtype)

    def build() -> PDRUNet:
        compute_dtype = None if compute is None else jnp.dtype(compute)
        return PDRUNet.from_options(**case.options, param_dtype=dtype, dtype=compute_dtype, rngs=nnx.Rngs(0))

    execution = Execution.of(case.path, remat=remat, mesh=mesh)

    graph = nnx.graphdef(nnx.eval_shape(build))
    params, stats = (jax.tree.map(jnp.asarray, part) for part in (imported.params, imported.stats))
    images, masks, objective = make_images(case), make_masks(case), make_objective(case)
    if not train:
        return {
            "logits": np.asarray(
                compiled(lambda p, s: nnx.merge(graph, p, s)(images, execution=execution))(params, stats)
            )
        }

    def forward(params: Any, stats: Any) -> Any:
        model = nnx.merge(graph, params, stats, copy=True)
        logits = model(images, train=True, dropout_masks=[jnp.asarray(mask) for mask in masks], execution=execution)
        return loss_of(objective)(logits), (logits, nnx.state(model, nnx.BatchStat))

    (loss, (logits, stats)), gradients = compiled(jax.value_and_grad(forward, has_aux=True))(params, stats)
    arrays = to_public(gradients, stats, dead_block=False)
    return {"loss": np.asarray(loss), "logits": np.asarray(logits), **arrays}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", ["polyphase", "fused"])
@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_every_path_agrees_with_the_plain_one(case: Case, path: str, dtype: str, budget: Budget) -> None:
    case = case.replace(dtype=dtype)
    for train in (False, True):
        got, want = outcome(case.replace(path=path), train=train), outcome(case, train=train)
        compare_paths(budget, "convolution path", dtype, case, got, want, f"{path} {case}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_evaluation_in_parts_agrees_with_the_plain_path(
    dtype: str, budget: Budget, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = NETWORKS[0].replace(dtype=dtype)
    monkeypatch.setattr(parts, "PART_PIXELS", 256)  # less than a batch of any layout, more than a phase
    got = outcome.__wrapped__(case.replace(path="fused"), train=False)
    compare_paths(budget, "convolution path", dtype, case, got, outcome(case, train=False), f"parts {case}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("norm", "strip"), [("batch", 64), ("batch", 512), ("none", 64)])
def test_winograd_convolutions_agree_with_the_plain_path(
    norm: str, strip: int, dtype: str, budget: Budget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In evaluation, and in training where there is no normalisation; in strips of rows, and of several phases."""
    case = Case(filters=winograd.MIN_CHANNELS, shape=(1, 64, 96), norm=norm, dtype=dtype)
    monkeypatch.setattr(winograd, "MIN_PIXELS", 0)
    monkeypatch.setattr(winograd, "STRIP_PIXELS", strip)
    for train in (False, True) if norm == "none" and dtype == "float64" else (False,):
        got = outcome.__wrapped__(case.replace(path="fused"), train=train)
        compare_paths(budget, "convolution path", dtype, case, got, outcome(case, train=train), f"Winograd {case}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", ["plain", "polyphase", "fused"])
def test_rematerialisation_changes_nothing(path: str, dtype: str, budget: Budget) -> None:
    case = NETWORKS[0].replace(dtype=dtype, path=path)
    compare_paths(budget, "rematerialisation", dtype, case, outcome(case, remat=True), outcome(case), str(case))


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("path", ["plain", "polyphase", "fused"])
def test_bfloat16_agrees_with_float32(path: str, remat: bool, budget: Budget) -> None:
    case = NETWORKS[0].replace(dtype="float32")
    got, want = outcome(case.replace(path=path), "bfloat16", remat=remat), outcome(case)
    assert got["e1.bnorm1.running_var"].dtype == got["e1.first.weight"].dtype == got["logits"].dtype == np.float32
    compare_paths(budget, "bfloat16", "float32", case, got, want, f"{path} {case}")


def accumulated(case: Case, parts: int, compute: str | None = None, remat: bool = False) -> Arrays:
    """Loss, logits and gradients of a batch that is taken in parts; without dropout, whose masks are of a part."""
    case = case.replace(dropout=0.0)
    imported = from_public(state_of(case), "the twin")

    def build() -> PDRUNet:
        dtype = None if compute is None else jnp.dtype(compute)
        param_dtype = jnp.dtype(case.dtype)
        return PDRUNet.from_options(**case.options, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))

    execution = Execution.of(case.path, remat=remat)

    graph = nnx.graphdef(nnx.eval_shape(build))
    objective: Objective = make_objective(case)
    params, stats = (jax.tree.map(jnp.asarray, part) for part in (imported.params, imported.stats))
    valid = np.ones_like(objective.valid)  # the mean over a part's pixels is then the batch's
    data = tuple(jnp.asarray(array) for array in (make_images(case), objective.target, valid))
    loss = make_loss(LossConfig(name="bce_dice"), 1)
    run = compiled(lambda p, s: accumulate(graph, execution, loss, (p, s), data, jax.random.key(0), parts))
    value, logits, gradients, stats = run(params, stats)
    return {
        "loss": np.asarray(value),
        "logits": np.asarray(logits),
        **to_public(gradients, stats, dead_block=False),
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_accumulated_gradients_are_those_of_the_whole_batch(dtype: str, budget: Budget) -> None:
    """Without normalisation: with it, the statistics are a part's, in PyTorch as well."""
    case = Case(norm="none", shape=(4, 16, 16), dtype=dtype)
    compare_paths(budget, "accumulation", dtype, case, accumulated(case, 4), accumulated(case, 1), str(case))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", ["plain", "polyphase", "fused"])
def test_accumulation_with_rematerialisation_is_the_whole_batch_without(path: str, dtype: str, budget: Budget) -> None:
    case = Case(norm="none", shape=(4, 32, 32), dtype=dtype, path=path)
    got, want = accumulated(case, 4, remat=True), accumulated(case, 1)
    compare_paths(budget, "accumulation", dtype, case, got, want, f"rematerialised {case}")


@pytest.mark.parametrize("path", ["plain", "polyphase", "fused"])
def test_accumulation_with_rematerialisation_changes_no_more_in_bfloat16(path: str, budget: Budget) -> None:
    case = Case(norm="none", shape=(4, 32, 32), dtype="float32", path=path)
    got, want = accumulated(case, 4, "bfloat16", remat=True), accumulated(case, 1, "bfloat16")
    compare_paths(budget, "bfloat16", "float32", case, got, want, f"accumulated, rematerialised {case}")
