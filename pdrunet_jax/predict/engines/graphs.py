"""Runtimes that compute the network as an ONNX graph, on the CPU: onnxruntime and OpenVINO. They need no JAX."""

import sys
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np

from pdrunet_jax.model.pixels import average_logits
from pdrunet_jax.predict.engines.engine import Engine, EngineName, Facts, Precision, check_engine
from pdrunet_jax.runtime.errors import UserError

Run = Callable[[np.ndarray], np.ndarray]
"""From images (N, C, H, W), float32 in [0, 1], to logits (N, K, H, W)."""

MOST_SIZES = 4
"""Sizes of images whose graphs stay open."""


class GraphEngine(Engine):
    """A network, or the networks of an ensemble, in onnxruntime or OpenVINO.

    Args:
        name: the runtime.
        precision: arithmetic of the convolutions.
        facts: what is known of the network.
        graphs: a graph of each network for images of a size, from `loading.network_graph`.

    Raises `UserError` if this computer does not compute in this precision.
    """

    def __init__(
        self, name: EngineName, precision: Precision, facts: Facts, graphs: Callable[[tuple[int, int]], list[bytes]]
    ) -> None:
        super().__init__(name, precision, facts)
        check_engine(name, precision)
        self._open = {"onnxruntime": open_onnxruntime, "openvino": open_openvino}[name]
        self._graphs = graphs
        self._runs: OrderedDict[tuple[int, int], list[Run]] = OrderedDict()
        if precision == "bfloat16" and not has_bfloat16():
            raise UserError(f"--precision bfloat16: this processor has no such arithmetic for {name}; leave it out")

    def logits(self, images: np.ndarray) -> np.ndarray:
        """As of `Engine`."""
        height, width = images.shape[1:3]
        unit = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).astype(np.float32) / np.float32(255)
        logits = [run(unit).transpose(0, 2, 3, 1) for run in self._runs_for((height, width))]
        return average_logits(logits, multilabel=self.facts.multilabel)

    def _runs_for(self, size: tuple[int, int]) -> list[Run]:
        if size not in self._runs:
            self._runs[size] = [self._open(graph, size, self.precision) for graph in self._graphs(size)]
        self._runs.move_to_end(size)
        if len(self._runs) > MOST_SIZES:
            self._runs.popitem(last=False)
        return self._runs[size]


def open_onnxruntime(graph: bytes, size: tuple[int, int], precision: Precision) -> Run:
    """Open a graph in onnxruntime."""
    runtime = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors only; the warnings concern the machine
    # Threads that wait in a loop would keep the cores from reading and writing images.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = runtime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def run(images: np.ndarray) -> np.ndarray:
        return np.asarray(session.run(["logits"], {"images": images})[0])

    return run


def open_openvino(graph: bytes, size: tuple[int, int], precision: Precision) -> Run:
    """Open a graph in OpenVINO, for images of one size alone: it is faster than a graph for all."""
    model = _core().read_model(graph)
    channels = model.input(0).partial_shape[1].get_length()
    model.reshape([-1, channels, *size])
    hint = {"float32": "f32", "bfloat16": "bf16"}[precision]  # its default is bf16 where the processor has it
    compiled = _core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"})

    def run(images: np.ndarray) -> np.ndarray:
        return np.array(compiled(images)[0])  # a copy: the result lies in memory that the next call writes to

    return run


def has_bfloat16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this computer; it would take float32 instead."""
    return "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@cache
def _core() -> Any:
    # As it is imported, OpenVINO reports its use to its makers, unless this package of its is missing.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return import_module("openvino").Core()
