"""Scores that several processes have computed, each of some images, put together in all of them."""

import base64
import dataclasses
import json
from collections.abc import Sequence

from pdrunet_jax.calibration import Histograms
from pdrunet_jax.data.partition import Sample
from pdrunet_jax.processes import Group
from pdrunet_jax.rows import Row


def exchange(
    group: Group, samples: Sequence[Sample], rows: Sequence[Row], masks: dict[str, bytes], histograms: Histograms
) -> tuple[list[Row], dict[str, bytes]]:
    """Rows and masks of all processes, in the order of `samples`; `histograms` then counts the images of all.

    The arguments are what this process has. Numbers come back as they were: JSON has every digit of a float.
    """
    mine = {
        "rows": [dataclasses.astuple(row) for row in rows],
        "masks": {name: base64.b64encode(mask).decode() for name, mask in masks.items()},
        "histograms": histograms.counts(),
    }
    parts = [json.loads(part) for part in group.exchange(json.dumps(mine).encode())]
    place = {sample.id: number for number, sample in enumerate(samples)}
    every = sorted((Row(*row) for part in parts for row in part["rows"]), key=lambda row: place[row.image])
    found = {name: base64.b64decode(mask) for part in parts for name, mask in part["masks"].items()}
    for index, part in enumerate(parts):
        if index != group.index:
            histograms.add_counts(part["histograms"])
    return every, {sample.id: found[sample.id] for sample in samples}
