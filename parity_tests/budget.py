"""The error budget: what each comparison may differ by, and what it was measured to differ by."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

BIT_EQUAL = (0.0, 0.0)

STANDARD: dict[int, tuple[float, float]] = {
    1: BIT_EQUAL,
    2: (1e-12, 1e-5),
    3: (1e-11, 1e-4),
    4: (1e-12, 1e-6),
    5: (1e-10, 1e-3),
    6: (1e-12, 1e-5),
}
"""Level: the loosest tolerance it may have in float64 and in float32."""

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
    (2, "initial kernels"): (5e-3, 5e-3),
    (2, "initial biases"): (1e-1, 1e-1),
    (3, "activations, eval"): (4e-15, 2.5e-6),
    (3, "activations, train"): (2.5e-14, 1.2e-5),
    (3, "logits, eval"): (3e-15, 2e-6),
    (3, "logits, train"): (1.5e-14, 7e-6),
    (4, "loss"): (2.5e-15, 1e-6),
    (4, "loss gradient"): (3.5e-15, 1e-6),
    (4, "metrics"): (1e-12, 1e-7),
    (4, "preprocessing"): BIT_EQUAL,
    (5, "loss"): (6e-15, 1e-6),
    (5, "gradients"): (1e-12, 4e-4),
    (5, "gradients of biases before BatchNorm"): (2e-13, 1e-4),
    (6, "running mean"): (1.5e-15, 1e-6),
    (6, "running variance"): (1.2e-15, 8e-7),
    (6, "batches tracked"): BIT_EQUAL,
}
"""Level and comparison: tolerance in float64 and in float32, about twice what was measured on CPUs."""


@dataclasses.dataclass
class Row:
    """One line of the printed budget: the worst over all cases."""

    level: int
    comparison: str
    dtype: str
    tolerance: float
    measured: float = 0.0
    worst: str = ""
    cases: int = 0


class Budget:
    """Holds comparisons to their tolerances and remembers what was measured."""

    def __init__(self) -> None:
        self.rows: dict[tuple[int, str, str], Row] = {}
        self.controls: dict[str, str] = {}

    def hold(self, level: int, comparison: str, dtype: str, errors: Mapping[str, float], where: str = "") -> None:
        """Note `errors` (by name, in the order of computation) and assert that all are within the tolerance.

        The message names the first that is not: when a network differs, that is where to look.
        """
        tolerance = TOLERANCES[level, comparison][0 if dtype == "float64" else 1]
        row = self.rows.setdefault((level, comparison, dtype), Row(level, comparison, dtype, tolerance))
        row.cases += 1
        for name, error in errors.items():
            if not error <= row.measured:  # NaN counts as worse than anything
                row.measured, row.worst = error, f"{name} ({where})" if where else name
        wrong = [name for name, error in errors.items() if not error <= tolerance]
        place = f"level {level}, {comparison}, {dtype}{f', {where}' if where else ''}"
        assert not wrong, (
            f"{place}: {len(wrong)} of {len(errors)} differ, "
            f"first {wrong[0]} by {errors[wrong[0]]:.2e} where {tolerance:.0e} is allowed"
        )

    def lines(self) -> list[str]:
        """The budget as a table for the terminal."""
        heading = f"{'level':5}  {'comparison':38} {'dtype':8} {'measured':>9} {'tolerance':>9} {'cases':>5}  worst"
        lines = [heading]
        for row in sorted(self.rows.values(), key=lambda row: (row.level, row.comparison, row.dtype)):
            tolerance = "bit-equal" if row.tolerance == 0 else f"{row.tolerance:.1e}"
            lines.append(
                f"{row.level:5}  {row.comparison:38} {row.dtype:8} {row.measured:9.1e} {tolerance:>9} {row.cases:5}"
                f"  {row.worst}"
            )
        if self.controls:
            lines += ["", "negative control, and the check that it made fail"]
            lines += [f"  {name}: {caught}" for name, caught in self.controls.items()]
        return lines

    def write(self, path: Path) -> None:
        """The same as JSON."""
        report = {"budget": [dataclasses.asdict(row) for row in self.rows.values()], "controls": self.controls}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
