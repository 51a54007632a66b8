"""The error budget: tolerance and measured error of every comparison."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

BIT_EQUAL = (0.0, 0.0)
NOT_HELD = 0.0
"""Placeholder for a dtype without such a comparison; any comparison would fail."""

STANDARD: dict[int, tuple[float, float]] = {
    1: BIT_EQUAL,
    2: (1e-12, 1e-5),
    3: (1e-11, 1e-4),
    4: (1e-12, 1e-6),
    5: (1e-10, 1e-3),
    6: (1e-12, 1e-5),
    7: (1e-13, 1e-6),
    8: (1e-12, 1e-5),
    9: (1e-12, 1e-5),
    10: (1e-11, 1e-4),
}
"""Level: its loosest permitted tolerance in float64 and in float32."""

EXCEPTIONS: dict[str, tuple[float, float]] = {
    "initial kernels": (5e-3, 5e-3),
    "initial biases": (1e-1, 1e-1),
    "initial kernels of transposed convolutions": (5e-2, 5e-2),
    "loss of training steps": (1e-9, 1e-5),
    # The gradient of a bias before BatchNorm is rounding noise, which Adam turns into updates. In float32 an update can
    # be as large as the learning rate; see `compare_trajectories`.
    "biases before BatchNorm": (1e-6, 1e-1),
    "running mean after steps": (1e-6, 1e-1),
    "logits at the end, with BatchNorm": (1e-6, 1.0),
    "bfloat16: logits": (2e-2, 2e-2),
    "bfloat16: gradients": (2e-2, 2e-2),
    "bfloat16: buffers": (2e-2, 2e-2),
}
"""Comparisons with a limit of their own, for statistics, chaos or half precision."""


def standard(level: int, comparison: str) -> tuple[float, float]:
    """Return the loosest permitted tolerance of a comparison in float64 and in float32."""
    return EXCEPTIONS.get(comparison, STANDARD[level])


TOLERANCES: dict[tuple[int, str], tuple[float, float]] = {
    (1, "names, shapes, dtypes"): BIT_EQUAL,
    (1, "torch -> JAX -> torch"): BIT_EQUAL,
    (1, "JAX -> torch -> JAX"): BIT_EQUAL,
    (2, "convolution"): (1.5e-15, 6e-7),
    (2, "batch norm, eval"): (5e-16, 2.5e-7),
    (2, "batch norm, train"): (1.5e-15, 4e-7),
    (2, "block, eval"): (1.5e-15, 8e-7),
    (2, "block, train"): (3.5e-15, 1e-6),
    (2, "dropout"): (4e-16, 1e-7),
    (2, "resampling"): (2e-15, 8e-7),
    (2, "initial kernels of transposed convolutions"): (5e-2, 5e-2),
    (2, "initial kernels"): (5e-3, 5e-3),
    (2, "initial biases"): (1e-1, 1e-1),
    (3, "activations, eval"): (4e-15, 2.5e-6),
    (3, "activations, train"): (4.5e-14, 1e-5),
    (3, "logits, eval"): (3e-15, 2e-6),
    (3, "logits, train"): (4.5e-14, 6e-6),
    (4, "loss"): (2.5e-15, 1e-6),
    (4, "loss gradient"): (3.5e-15, 1e-6),
    (4, "metrics"): (1e-12, 1e-7),
    (4, "preprocessing"): BIT_EQUAL,
    (5, "loss"): (5e-15, 1.4e-6),
    (5, "gradients"): (1e-12, 9e-4),
    (5, "gradients of biases before BatchNorm"): (2e-13, 1.2e-4),
    (6, "running mean"): (8e-15, 1.9e-6),
    (6, "running variance"): (1.1e-14, 5e-7),
    (6, "batches tracked"): BIT_EQUAL,
    (7, "updates"): (1.1e-14, 2.5e-7),
    (7, "learning rate"): (1.5e-7, 1.5e-7),
    (7, "state, torch -> JAX -> torch"): BIT_EQUAL,
    (7, "state, JAX -> torch -> JAX"): BIT_EQUAL,
    (8, "loss of training steps"): (7e-15, 2.5e-6),
    (8, "kernels"): (2e-15, 1e-7),
    (8, "scales and biases"): (6e-15, 3e-7),
    (8, "biases before BatchNorm"): (5e-8, 1.2e-2),
    (8, "running mean after steps"): (3e-8, 3e-3),
    (8, "running variance"): (1.2e-14, 4e-7),
    (8, "batches tracked"): BIT_EQUAL,
    (8, "logits at the end, with BatchNorm"): (5e-8, 1e-2),
    (8, "logits at the end, without BatchNorm"): (6e-16, NOT_HELD),
    (9, "loss of training steps"): (1e-14, NOT_HELD),
    (9, "kernels"): (7e-15, NOT_HELD),
    (9, "scales and biases"): (7e-15, NOT_HELD),
    (9, "biases before BatchNorm"): (5e-8, NOT_HELD),
    (9, "running mean after steps"): (3e-8, NOT_HELD),
    (9, "running variance"): (5e-14, NOT_HELD),
    (9, "batches tracked"): BIT_EQUAL,
    (9, "logits at the end, with BatchNorm"): (5e-8, NOT_HELD),
    (9, "logits at the end, without BatchNorm"): (6e-16, NOT_HELD),
    (10, "convolution path: logits"): (7e-15, 3.5e-6),
    (10, "convolution path: gradients"): (7e-14, 3e-5),
    (10, "convolution path: buffers"): (9e-16, 4.5e-7),
    (10, "rematerialisation: logits"): (1e-15, 1e-7),
    (10, "rematerialisation: gradients"): (6e-15, 5e-7),
    (10, "rematerialisation: buffers"): (1e-15, 1e-7),
    (10, "bfloat16: logits"): (2e-2, 2e-2),
    (10, "bfloat16: gradients"): (2e-2, 2e-2),
    (10, "bfloat16: buffers"): (9e-3, 9e-3),
    (10, "accumulation: logits"): (2e-16, 1e-7),
    (10, "accumulation: gradients"): (6e-15, 1.3e-6),
    (10, "sharding: logits"): (3e-15, NOT_HELD),
    (10, "sharding: gradients"): (5.5e-14, NOT_HELD),
    (10, "sharding: buffers"): (1.2e-15, NOT_HELD),
    (10, "sharding of other networks: logits"): (1e-14, NOT_HELD),
    (10, "sharding of other networks: gradients"): (5.5e-14, NOT_HELD),
    (10, "sharding of other networks: buffers"): (2e-15, NOT_HELD),
}
"""Level and comparison: tolerance in float64 and in float32, about twice the error measured on CPUs."""


class DifferenceError(AssertionError):
    """Errors above their tolerance, by name in the order of computation.

    Attributes:
        order: how many comparisons of the budget came before, and how many errors of this one were within tolerance
            before the first that was not: the larger, the later in the computation.
        first: name of the first error above the tolerance.
        worst: the largest error.
    """

    def __init__(self, message: str, order: tuple[int, int], errors: Mapping[str, float], first: str) -> None:
        super().__init__(message)
        self.order, self.first = order, first
        self.worst = max((error for error in errors.values() if error == error), default=float("inf"))


PICTURED = {(3, "activations, eval"), (3, "activations, train"), (5, "gradients")}
"""Comparisons whose errors are kept by name, for the report's chart of error by layer."""


@dataclasses.dataclass
class Row:
    """One line of the printed budget: the largest error over all cases."""

    level: int
    comparison: str
    dtype: str
    tolerance: float | None
    """None: measured only."""
    measured: float = 0.0
    worst: str = ""
    cases: int = 0


def tolerance_of(level: int, comparison: str, dtype: str, measured: bool = True) -> float:
    """Return the tolerance of a comparison: measured on this project's networks and CPUs, or the standard's."""
    both = TOLERANCES[level, comparison]
    if both != BIT_EQUAL and not measured:
        both = standard(level, comparison)
    return both[0 if dtype == "float64" else 1]


class Budget:
    """Check comparisons against their tolerances and record the measured errors.

    Attributes:
        measured_here: use the tolerances measured on CPUs; False on other devices, where the standard's apply.
        ours: the networks are this project's, whose errors were measured; for any other the standard applies.
    """

    measured_here: ClassVar[bool] = True

    def __init__(self, *, ours: bool = True) -> None:
        self.ours = ours
        self.held = 0
        self.rows: dict[tuple[int, str, str], Row] = {}
        self.layers: dict[tuple[int, str, str], dict[str, float]] = {}
        self.controls: dict[str, str] = {}

    def hold(self, level: int, comparison: str, dtype: str, errors: Mapping[str, float], where: str = "") -> None:
        """Record `errors`, by name in the order of computation, and assert that all are within the tolerance.

        The message names the first error above it, which is where the two networks begin to differ.
        """
        tolerance = tolerance_of(level, comparison, dtype, self.ours and Budget.measured_here)
        self.held += 1
        errors = {name: float(error) for name, error in errors.items()}  # NumPy's cannot be sent between processes
        row = self.rows.setdefault((level, comparison, dtype), Row(level, comparison, dtype, tolerance))
        row.cases += 1
        if (level, comparison) in PICTURED:
            layers = self.layers.setdefault((level, comparison, dtype), {})
            for name, error in errors.items():
                layers[name] = max(error, layers.get(name, 0.0))
        for name, error in errors.items():
            if not error <= row.measured:  # NaN counts as worse than anything
                row.measured, row.worst = error, f"{name} ({where})" if where else name
        wrong = [name for name, error in errors.items() if not error <= tolerance]
        if wrong:
            place = f"level {level}, {comparison}, {dtype}{f', {where}' if where else ''}"
            raise DifferenceError(
                f"{place}: {len(wrong)} of {len(errors)} differ, "
                f"first {wrong[0]} by {errors[wrong[0]]:.2e} where {tolerance:.0e} is allowed",
                (self.held, list(errors).index(wrong[0])),
                errors,
                wrong[0],
            )

    def note(self, level: int, comparison: str, dtype: str, measured: float) -> None:
        """Record a figure without a tolerance."""
        self.rows[level, comparison, dtype] = Row(level, comparison, dtype, None, float(measured), cases=1)

    def lines(self) -> list[str]:
        """Return the budget as a table for the terminal."""
        heading = f"{'level':5}  {'comparison':38} {'dtype':8} {'measured':>9} {'tolerance':>9} {'cases':>5}  worst"
        lines = [heading]
        for row in self.sorted_rows():
            tolerance = {0.0: "bit-equal", None: "none"}.get(row.tolerance) or f"{row.tolerance:.1e}"
            lines.append(
                f"{row.level:5}  {row.comparison:38} {row.dtype:8} {row.measured:9.1e} {tolerance:>9} {row.cases:5}"
                f"  {row.worst}"
            )
        if self.controls:
            lines += ["", "negative control: the check that failed, as it must"]
            lines += [f"  {name}: {caught}" for name, caught in self.controls.items()]
        return lines

    def merge(self, other: Mapping[str, Any]) -> None:
        """Add the budget of another process, from its `as_dict`."""
        for values in other["budget"]:
            theirs = Row(**values)
            row = self.rows.setdefault((theirs.level, theirs.comparison, theirs.dtype), dataclasses.replace(theirs))
            if row != theirs:
                row.cases += theirs.cases
                if not theirs.measured <= row.measured:
                    row.measured, row.worst = theirs.measured, theirs.worst
        for layer in other["layers"]:
            key = (layer["level"], layer["comparison"], layer["dtype"])
            mine = self.layers.setdefault(key, {})
            mine |= {name: max(error, mine.get(name, 0.0)) for name, error in layer["errors"].items()}
        self.controls |= other["controls"]

    def as_dict(self) -> dict[str, Any]:
        """Return the budget as plain values, for JSON."""
        return {
            "budget": [dataclasses.asdict(row) for row in self.sorted_rows()],
            "layers": [
                {"level": level, "comparison": comparison, "dtype": dtype, "errors": errors}
                for (level, comparison, dtype), errors in self.layers.items()
            ],
            "controls": self.controls,
        }

    def sorted_rows(self) -> list[Row]:
        """Return the rows by level, comparison and dtype."""
        return sorted(self.rows.values(), key=lambda row: (row.level, row.comparison, row.dtype))
