"""Reader of the files that W&B writes for an offline run, and its service process."""

import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def frames(path: Path) -> Iterator[bytes]:
    """Yield the records of a `.wandb` file: LevelDB's log format after a header of 7 bytes."""
    data, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:  # padding at the end of a block
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            yield record
            record = b""


def records(run: Path) -> list[list[Any]]:
    """Records of each offline run in a run folder."""
    messages = importlib.import_module("wandb.proto.wandb_internal_pb2")
    paths = sorted(run.glob("wandb/offline-run-*/*.wandb"))
    return [[messages.Record.FromString(frame) for frame in frames(path)] for path in paths]


def history(found: list[Any], key: str) -> list[Any]:
    """Values of a history key, in order."""
    items = [item for record in found if record.HasField("history") for item in record.history.item]
    return [json.loads(item.value_json) for item in items if key in (item.key, *item.nested_key)]


def summary(found: list[Any]) -> dict[str, Any]:
    """Last value of each summary entry."""
    values = {}
    for record in found:
        if record.HasField("summary"):
            for item in record.summary.update:
                values["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
    return values


def wandb_service() -> int:
    """Process id of the W&B service that this process has started."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, fields = stat.read_text().rsplit(")", 1)
        except OSError:  # it ended meanwhile
            continue
        state, parent = fields.split()[:2]
        if name.endswith("(wandb-core") and state != "Z" and int(parent) == os.getpid():
            return int(stat.parent.name)
    raise AssertionError("no W&B service")
