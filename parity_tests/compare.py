"""The comparisons that the levels share, and that the negative controls must make fail."""

from collections.abc import Mapping

import numpy as np
from scipy.stats import ks_2samp

from parity_tests.budget import Budget
from parity_tests.pairs import Case, Pass


def largest(got: np.ndarray, want: np.ndarray) -> float:
    """The largest absolute difference; infinite for another shape or dtype, NaN for NaN."""
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    return float(np.abs(got - want).max(initial=0.0))


def relative(got: np.ndarray, want: np.ndarray) -> float:
    """The largest difference over the largest magnitude."""
    return largest(got, want) / max(float(np.abs(want).max(initial=0.0)), np.finfo(np.float64).tiny)


def of_norm(got: np.ndarray, want: np.ndarray) -> float:
    """The norm of the difference over the norm."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    return float(np.linalg.norm(got - want) / max(float(np.linalg.norm(want)), np.finfo(np.float64).tiny))


def same_names(got: Mapping[str, object], want: Mapping[str, object], what: str) -> None:
    """Assert that neither side has a name that the other lacks."""
    difference = sorted(got.keys() ^ want.keys())
    assert not difference, f"{what}: names on one side only: {', '.join(difference)}"


def compare_outputs(budget: Budget, case: Case, mode: str, got: Pass, want: Pass) -> None:
    """Level 3: every named activation, in the order of the forward pass, and the logits."""
    if case.path != "fused":
        same_names(got.activations, want.activations, f"activations, {mode}")
    assert {"std_block", "e1", "bottleneck.0", "bottleneck.4", "d5", "final_conv"} <= got.activations.keys()
    errors = {
        name: relative(got.activations[name], array)
        for name, array in want.activations.items()
        if name in got.activations  # the fused path has no values between convolution and normalisation
    }
    budget.hold(3, f"activations, {mode}", case.dtype, errors, str(case))
    # Absolute for logits of ordinary size; these networks are untrained and reach hundreds.
    error = largest(got.logits, want.logits) / max(1.0, float(np.abs(want.logits).max()))
    budget.hold(3, f"logits, {mode}", case.dtype, {"logits": error}, str(case))


def compare_gradients(budget: Budget, case: Case, got: Pass, want: Pass) -> None:
    """Level 5: the gradient of every parameter, as a share of its norm.

    A bias before BatchNorm has no effect, hence a true gradient of zero; what either framework computes is rounding
    noise, which is measured against the gradient of the kernel beside it.
    """
    assert got.gradients is not None
    assert want.gradients is not None
    assert got.loss is not None
    assert want.loss is not None
    same_names(got.gradients, want.gradients, "gradients")
    budget.hold(5, "loss", case.dtype, {"loss": abs(got.loss - want.loss) / abs(want.loss)}, str(case))
    live, dead = {}, {}
    for name, array in want.gradients.items():
        if case.norm == "batch" and name.endswith(("first.bias", "second.bias")):
            kernel = want.gradients[name.replace("bias", "weight")]
            dead[name] = float(np.linalg.norm(got.gradients[name] - array) / np.linalg.norm(kernel))
        else:
            live[name] = of_norm(got.gradients[name], array)
    budget.hold(5, "gradients", case.dtype, live, str(case))
    if dead:
        budget.hold(5, "gradients of biases before BatchNorm", case.dtype, dead, str(case))


def compare_buffers(budget: Budget, case: Case, got: Pass, want: Pass) -> None:
    """Level 6: running mean, running variance and batch count of every normalisation."""
    same_names(got.buffers, want.buffers, "buffers")
    for ending, comparison in (
        ("num_batches_tracked", "batches tracked"),
        ("running_mean", "running mean"),
        ("running_var", "running variance"),
    ):
        errors = {
            name: relative(got.buffers[name], array) for name, array in want.buffers.items() if name.endswith(ending)
        }
        assert errors, f"no {comparison} to compare"
        budget.hold(6, comparison, case.dtype, errors, str(case))


def compare_initialisation(
    budget: Budget, dtype: str, got: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray]
) -> None:
    """Level 2: initial kernels and biases come from one distribution.

    All are brought to U(-1, 1) by torch.nn.Conv2d's bound, 1 / sqrt(fan_in), and pooled: 360,000 kernel entries, 1040
    biases. Measured is Kolmogorov and Smirnov's distance, whose noise goes with the square root of the sample.
    """
    same_names(got, want, "parameters")
    for leaf, comparison in (("weight", "initial kernels"), ("bias", "initial biases")):
        pooled = []
        for arrays in (got, want):
            names = [name for name in arrays if name.endswith((f"first.{leaf}", f"second.{leaf}"))]
            fans = [np.prod(arrays[name.replace("bias", "weight")].shape[1:]) for name in names]
            pooled.append(np.concatenate([arrays[n].ravel() * fan**0.5 for n, fan in zip(names, fans, strict=True)]))
        ours, theirs = pooled
        errors = {leaf: float(ks_2samp(ours, theirs).statistic), "largest": abs(float(np.abs(ours).max()) - 1)}
        budget.hold(2, comparison, dtype, errors)
