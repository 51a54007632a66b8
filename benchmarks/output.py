"""JSON output of the benchmarks."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write(result: Mapping[str, Any], file: Path | None) -> None:
    """Write `result` as JSON to `file`, creating its folder; None writes nothing."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
