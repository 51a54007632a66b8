"""Export to ONNX: a graph from images to masks, built node by node under the public names.

Images are resized exactly as Pillow does (see `onnx_resize.py`). Padding is part of the weights, as in StableHLO.
"""

import importlib
import json
from collections.abc import Callable
from types import ModuleType

import numpy as np

from pdrunet_jax.export.onnx_resize import resize_images, resize_probability, span_image
from pdrunet_jax.export.stablehlo import GraphSpec
from pdrunet_jax.model.base import Network
from pdrunet_jax.model.onnx_network import IR_VERSION, OPSET, Nodes, add_network
from pdrunet_jax.runtime.errors import UserError
from pdrunet_jax.runtime.extras import how_to_install


def build_onnx(model: Network, spec: GraphSpec) -> bytes:
    """Serialise a float32 model; the metadata become `metadata_props`, as JSON unless they are strings.

    Raises `UserError` if the package onnx is missing.
    """
    onnx = require("onnx")
    helper, types = onnx.helper, onnx.TensorProto
    nodes = Nodes(onnx)
    single, softmax = model.outputs == 1, model.outputs > 1 and not model.multilabel

    # From pixels to logits.
    x, resized = nodes.add("Transpose", "images", perm=[0, 3, 1, 2]), None
    if spec.size is not None and not spec.network_only:
        dims = nodes.add("Shape", "images")
        height, width = (nodes.add("Gather", dims, nodes.constant(np.int64(axis))) for axis in (1, 2))
        shape = height, width
        resized = shape, span_image(nodes, shape, spec.size, spec.fit)
        x = resize_images(nodes, x, *resized, tall_first=spec.tall_first)
    if not spec.network_only:
        x = nodes.add("Div", nodes.cast(x, np.float32), nodes.constant(np.float32(255)))
    logits = add_network(nodes, x, model, spec.size)
    nodes.add("Transpose", logits, perm=[0, 2, 3, 1], output="logits")

    # From logits to probabilities and the mask.
    probability = nodes.add("Softmax", logits, axis=1) if softmax else nodes.add("Sigmoid", logits)
    if resized:
        probability = resize_probability(nodes, probability, *resized)
    if single:
        nodes.add("Squeeze", probability, nodes.constant(np.array([1])), output="probability")
    else:
        nodes.add("Transpose", probability, perm=[0, 2, 3, 1], output="probability")
    if not spec.network_only:
        threshold = nodes.constant(np.asarray(spec.threshold, np.float32))
        classes = (
            nodes.add("ArgMax", "probability", axis=-1, keepdims=0)
            if softmax
            else nodes.add("Greater", "probability", threshold)
        )
        nodes.cast(classes, np.uint8, output="mask")

    # The file.
    value_info = helper.make_tensor_value_info
    inner: list[int | str] = ["H", "W"] if spec.size is None else [*spec.size]
    outer = inner if spec.network_only else ["H", "W"]
    kind = types.FLOAT if spec.network_only else types.UINT8
    images = value_info("images", kind, ["N", *outer, model.config.in_channels])
    outputs = [
        value_info("mask", types.UINT8, ["N", *outer, *([model.outputs] if model.multilabel else [])]),
        value_info("probability", types.FLOAT, ["N", *outer, *([] if single else [model.outputs])]),
        value_info("logits", types.FLOAT, ["N", *inner, model.outputs]),
    ][int(spec.network_only) :]
    used = {name for node in nodes.nodes for name in node.input}  # onnxruntime warns of each constant that is not
    constants = [constant for constant in nodes.initializers if constant.name in used]
    proto = helper.make_model(
        helper.make_graph(nodes.nodes, "pdrunet", [images], outputs, initializer=constants),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="pdrunet-jax",
        producer_version=str(spec.metadata.get("version", "")),
    )
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in spec.metadata.items()}
    helper.set_model_props(proto, texts)
    onnx.checker.check_model(proto, full_check=True)
    return bytes(proto.SerializeToString())


def open_onnx(data: bytes) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Load a graph in onnxruntime on the CPU: a function from images to outputs by name.

    Raises `UserError` if the package onnxruntime is missing.
    """
    runtime = require("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors only; the warnings concern the machine
    session = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(names, session.run(names, {"images": images}), strict=True))

    return run


def require(package: str, form: str = "onnx") -> ModuleType:
    """Import a package of the extra `export`, for `--format` `form`. Raises `UserError` if it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"--format {form} needs {package}: {how_to_install('export')}") from None
