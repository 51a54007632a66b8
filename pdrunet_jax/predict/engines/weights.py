"""Trained weights for prediction: what is known of them at once, the network itself when it is needed. Loads no JAX.

What the engines need is kept in the store (`runtime/store.py`) under the digest of the weights' files, so that the next
command starts without building the network.
"""

import io
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from pdrunet_jax.model.folds import find_folds
from pdrunet_jax.model.shipped import resolve_weights
from pdrunet_jax.model.sides import SWAP, Mirror, mirror_of
from pdrunet_jax.predict.engines.engine import Facts
from pdrunet_jax.runtime.digest import sha256 as digest_of
from pdrunet_jax.runtime.store import key_of, program_key, read_entry, versions, write_entry

if TYPE_CHECKING:
    from pdrunet_jax.model.base import Network

_CODE = ("model", "predict/engines", "runtime/compile.py", "runtime/programs.py")
"""What stored programs and graphs depend on in this package."""


class Weights:
    """Trained weights, as `load_model` takes them; notes on files that others have written are printed, unless `quiet`.

    Attributes:
        path: where they are from.
        facts: what prediction needs to know of the network.
        options: what the weights say about themselves, as in `model.load.Loaded`.
        wiring: options of the network that its arrays do not show, as JSON values.
        digest: SHA-256 of the arrays and the wiring, from `model.ensemble.weights_digest`.
        count: number of networks, more than one in an ensemble.
        key: what entries of the store depend on; empty if nothing is stored.

    Raises `UserError` as `load_model` does.
    """

    def __init__(self, path: str, *, quiet: bool = False) -> None:
        self.path = path
        self._quiet = quiet
        self.key = _key(path)
        stored = read_entry("network", self.key) if self.key else None
        known: dict[str, Any] = json.loads(stored) if stored else self._described()
        facts = known["facts"]
        facts |= {"size": facts["size"] and tuple(facts["size"]), "mirror": Mirror(**facts["mirror"])}
        facts["mirror"] = replace(facts["mirror"], channels=tuple(facts["mirror"].channels))
        self.facts = Facts(**facts)
        self.options: dict[str, Any] = known["options"]
        self.wiring: dict[str, Any] = known["wiring"]
        self.digest: str = known["digest"]
        self.count: int = known["count"]
        for note in known["notes"] if stored and not quiet else ():
            print(f"{path}: {note}", file=sys.stderr)
        self._quiet = True

    @cached_property
    def network(self) -> "Network":
        """The network itself. Loads JAX."""
        return self._loaded[1]

    @cached_property
    def arrays(self) -> list[np.ndarray]:
        """The arrays of a single network, in the order that `loading.flat_forward` takes them."""
        stored = read_entry("arrays", self.key) if self.key else None
        if stored:
            with np.load(io.BytesIO(stored), allow_pickle=False) as file:
                return [file[f"arr_{number}"] for number in range(len(file.files))]
        arrays: list[np.ndarray] = _loading().arrays_of(self.network)
        if self.key:
            content = io.BytesIO()
            np.savez(content, *arrays)
            write_entry("arrays", self.key, content.getvalue())
        return arrays

    def swap(self, pairs: tuple[tuple[str, str], ...]) -> None:
        """Let these pairs of classes change places in mirror images. Raises `UserError` for other names."""
        self.options[SWAP] = pairs
        self.facts = replace(self.facts, mirror=mirror_of(self.options, self.facts.outputs))

    def graphs(self, size: tuple[int, int], members: Sequence[int] | None = None) -> list[bytes]:
        """ONNX graphs of all networks, or of `members`, for images of `size`; see `loading.network_graph`."""
        fixed = None if self.facts.multiple == 1 else size  # others compute sizes of their own
        graphs = []
        for number in range(self.count) if members is None else members:
            key = key_of(self.key, fixed, number)
            graph = read_entry("graph", key) if self.key else None
            if graph is None:
                graph = _loading().network_graph(self.network.members[number], fixed)
                if self.key:
                    write_entry("graph", key, graph)
            graphs.append(graph)
        return graphs

    def program_key(self, shape: Sequence[int], calls: Sequence[str]) -> str:
        """Key of the program for images of this shape: one for all weights of an architecture.

        `calls` are the custom calls that it may contain.
        """
        forms = [[array.shape, str(array.dtype)] for array in self.arrays]
        return program_key(_CODE, self.wiring, asdict(self.facts), forms, list(shape), list(calls))

    @cached_property
    def _loaded(self) -> tuple[Any, "Network"]:
        loaded: tuple[Any, Network] = _loading().load(self.path, quiet=self._quiet)
        return loaded

    def _described(self) -> dict[str, Any]:
        """Everything about the network, as JSON values; stored for the next time."""
        loaded, network = self._loaded
        known: dict[str, Any] = _loading().describe(loaded, network)
        if self.key and all(each.files for each in loaded.members or (loaded,)):
            write_entry("network", self.key, json.dumps(known).encode())
        else:  # not from the files of the key alone
            self.key = ""
        copy: dict[str, Any] = json.loads(json.dumps(known))
        return copy


def _loading() -> Any:
    """The part that needs JAX."""
    return import_module("pdrunet_jax.predict.engines.loading")


def _key(path: str) -> str:
    """What everything stored depends on: the digests of the weights' files, and `versions`; empty if they are unknown.

    The files are one of weights, or the best weights of a run or of each fold, with config.toml. Raises `UserError` as
    `find_folds` does.
    """
    place = resolve_weights(path)
    best = [run.path / "best.safetensors" for run in find_folds(place)] if place.is_dir() else []
    files = best or [place / "best.safetensors" if place.is_dir() else place]
    files += [file.parent / "config.toml" for file in files if file.name == "best.safetensors"]
    if place.absolute().parent.name == "checkpoints":
        return ""
    try:
        digests = [digest_of(file) if os.path.lexists(file) else "" for file in files]
    except OSError:  # reported when they are read
        return ""
    return key_of(digests, versions(*_CODE)) if digests[0] else ""
