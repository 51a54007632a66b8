"""Where a benchmark keeps its results."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write(result: Mapping[str, Any], file: Path | None) -> None:
    """Write `result` as JSON to `file`, in folders made for it; None keeps nothing."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
