"""Comparisons shared by the levels; the negative controls must make them fail."""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import ks_2samp

from parity_tests.support.budget import Budget
from parity_tests.support.case import Arrays, Case, Compared, Pass, Trajectory, before_norm


def largest(got: np.ndarray, want: np.ndarray) -> float:
    """Largest absolute difference; infinite if shape or dtype differ, NaN for NaN."""
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    return float(np.abs(got - want).max(initial=0.0))


def relative(got: np.ndarray, want: np.ndarray) -> float:
    """Largest difference divided by the largest magnitude."""
    return largest(got, want) / max(float(np.abs(want).max(initial=0.0)), np.finfo(np.float64).tiny)


def of_norm(got: np.ndarray, want: np.ndarray) -> float:
    """Norm of the difference divided by the norm."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    return float(np.linalg.norm(got - want) / max(float(np.linalg.norm(want)), np.finfo(np.float64).tiny))


def same_names(got: Mapping[str, object], want: Mapping[str, object], what: str) -> None:
    """Assert that both sides have the same names."""
    difference = sorted(got.keys() ^ want.keys())
    assert not difference, f"{what}: names on one side only: {', '.join(difference)}"


def compare_outputs(budget: Budget, case: Compared, mode: str, got: Pass, want: Pass) -> None:
    """Level 3: every named activation, in the order of the forward pass, and the logits."""
    if not case.partial:
        same_names(got.activations, want.activations, f"activations, {mode}")
    errors = {
        name: relative(got.activations[name], array)
        for name, array in want.activations.items()
        if name in got.activations
    }
    assert errors, "no activation to compare"
    budget.hold(3, f"activations, {mode}", case.dtype, errors, str(case))
    # Absolute for logits of ordinary size; the logits of these untrained networks reach hundreds.
    error = largest(got.logits, want.logits) / max(1.0, float(np.abs(want.logits).max()))
    budget.hold(3, f"logits, {mode}", case.dtype, {"logits": error}, str(case))


def compare_gradients(budget: Budget, case: Compared, got: Pass, want: Pass) -> None:
    """Level 5: the gradient of every parameter, as a share of its norm.

    A bias before BatchNorm has no effect, so its true gradient is zero. Both frameworks compute rounding noise, which
    is compared relative to the gradient of the same layer's kernel.
    """
    assert got.gradients is not None
    assert want.gradients is not None
    assert got.loss is not None
    assert want.loss is not None
    same_names(got.gradients, want.gradients, "gradients")
    budget.hold(5, "loss", case.dtype, {"loss": abs(got.loss - want.loss) / abs(want.loss)}, str(case))
    live, dead = {}, {}
    for name, array in want.gradients.items():
        if case.silent(name, want.gradients):
            kernel = want.gradients[name.replace("bias", "weight")]
            dead[name] = float(np.linalg.norm(got.gradients[name] - array) / np.linalg.norm(kernel))
        else:
            live[name] = of_norm(got.gradients[name], array)
    budget.hold(5, "gradients", case.dtype, live, str(case))
    if dead:
        budget.hold(5, "gradients of biases before BatchNorm", case.dtype, dead, str(case))


def compare_buffers(budget: Budget, case: Compared, got: Pass, want: Pass) -> None:
    """Level 6: running mean, running variance and batch count of every normalisation."""
    same_names(got.buffers, want.buffers, "buffers")
    assert want.buffers, "no buffer to compare"
    for ending, comparison in (
        ("num_batches_tracked", "batches tracked"),
        ("running_mean", "running mean"),
        ("running_var", "running variance"),
    ):
        errors = {
            name: relative(got.buffers[name], array) for name, array in want.buffers.items() if name.endswith(ending)
        }
        if errors:
            budget.hold(6, comparison, case.dtype, errors, str(case))


def compare_initialisation(
    budget: Budget, dtype: str, got: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray]
) -> None:
    """Level 2: initial kernels and biases come from one distribution.

    All are scaled to U(-1, 1) by torch.nn.Conv2d's bound, 1 / sqrt(fan_in), and pooled: 360,000 kernel entries and 1040
    biases. The error is the Kolmogorov-Smirnov distance; its noise decreases with the square root of the sample size.
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


def compare_updates(budget: Budget, dtype: str, got: Sequence[Arrays], want: Sequence[Arrays], where: str) -> None:
    """Level 7: parameters after each update, relative to the largest parameter."""
    errors = {
        f"{name} after update {number + 1}": relative(ours[name], array)
        for number, (ours, theirs) in enumerate(zip(got, want, strict=True))
        for name, array in theirs.items()
    }
    budget.hold(7, "updates", dtype, errors, where)


def compare_trajectories(
    budget: Budget, level: int, case: Compared, got: Trajectory, want: Trajectory, where: str
) -> None:
    """Levels 8 and 9: every loss; every parameter and buffer after the last step; logits in evaluation mode.

    A bias before BatchNorm has no effect on the loss, so its gradient is rounding noise, which Adam turns into steps.
    The running mean follows the bias, and in evaluation mode the logits do; these three have tolerances of their own.
    """
    same_names(got.arrays, want.arrays, "arrays")
    losses = {f"step {i + 1}": abs(a - b) for i, (a, b) in enumerate(zip(got.losses, want.losses, strict=True))}
    budget.hold(level, "loss of training steps", case.dtype, losses, where)
    kinds: dict[str, dict[str, float]] = {}
    for name, array in want.arrays.items():
        error = largest(got.arrays[name], array)
        scale = max(1.0, float(np.abs(array).max(initial=0.0)))
        if name.endswith("num_batches_tracked"):
            kinds.setdefault("batches tracked", {})[name] = error
        elif name.endswith("running_mean"):
            kinds.setdefault("running mean after steps", {})[name] = error / scale
        elif name.endswith("running_var"):
            kinds.setdefault("running variance", {})[name] = error / scale
        elif case.silent(name, want.arrays):
            kinds.setdefault("biases before BatchNorm", {})[name] = error
        elif array.ndim > 1:
            kinds.setdefault("kernels", {})[name] = error
        else:
            kinds.setdefault("scales and biases", {})[name] = error
    for kind, errors in kinds.items():
        budget.hold(level, kind, case.dtype, errors, where)
    scale = max(1.0, float(np.abs(want.logits).max()))
    mode = "with" if "running variance" in kinds else "without"
    budget.hold(
        level, f"logits at the end, {mode} BatchNorm", case.dtype, {"logits": largest(got.logits, want.logits) / scale},
        where,
    )  # fmt: skip


def compare_paths(budget: Budget, what: str, dtype: str, case: Case, got: Arrays, want: Arrays, where: str) -> None:
    """Level 10: logits relative to the largest one, everything else as a share of its norm.

    In single and half precision, all gradients are compared as one vector. A case has about 800,000 ReLUs, and where an
    input is within rounding error of zero, two paths may disagree about its sign. The gradient of a whole pixel then
    appears or disappears: a large share of a small tensor, but a small share of all gradients.
    """
    same_names(got, want, "arrays")
    scale = max(1.0, float(np.abs(want["logits"]).max()))
    budget.hold(10, f"{what}: logits", dtype, {"logits": largest(got["logits"], want["logits"]) / scale}, where)
    gradients, buffers = {}, {}
    for name, array in want.items():
        if name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            buffers[name] = relative(got[name], array)
        elif before_norm(name, want):
            kernel = want[name.replace("bias", "weight")]  # a zero gradient; see `compare_gradients`
            gradients[name] = float(np.linalg.norm(got[name] - array) / np.linalg.norm(kernel))
        elif name != "logits":
            gradients[name] = of_norm(got[name], array)
    if gradients and dtype == "float32":
        names = [name for name in gradients if name != "loss"]
        together = [np.concatenate([arrays[name].ravel() for name in names]) for arrays in (got, want)]
        gradients = {"loss": gradients["loss"], "all": of_norm(*together)}
    for kind, errors in (("gradients", gradients), ("buffers", buffers)):
        if errors:
            budget.hold(10, f"{what}: {kind}", dtype, errors, where)
