"""Export to a page: one HTML file that segments images in a browser, offline.

The template, which holds everything but the model, is built from `web/` by `make web`. Wheels contain it. A page
contains the ONNX graph of the network alone and does the resizing itself, bit for bit as Pillow: images of more than
8 bits are not rounded before they are resized, as in `predict`.
"""

import base64
import gzip
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from pdrunet_jax.export.onnx_graph import build_onnx, open_onnx
from pdrunet_jax.export.stablehlo import GraphSpec
from pdrunet_jax.model.base import Network
from pdrunet_jax.runtime.errors import UserError

TEMPLATE = Path(__file__).with_name("page.html")

_FACTS, _MODEL = "__PDRUNET_FACTS__", "__PDRUNET_MODEL__"
_MODEL_BLOCK = re.compile(r'<script type="text/plain" id="asset-model">([^<]*)</script>')


def build_page(model: Network, spec: GraphSpec) -> bytes:
    """Write the ONNX graph of a float32 model and its facts into the template; `spec` is of the network only.

    Raises `UserError` if the template or the package onnx is missing.
    """
    template = read_template()
    facts = dict(spec.metadata) | {"channels": model.config.in_channels, "tall_first": spec.tall_first}
    packed = base64.b64encode(gzip.compress(build_onnx(model, spec), mtime=0)).decode()
    # A "<" in a class's name must not end the block that holds it.
    page = template.replace(_FACTS, json.dumps(facts).replace("<", r"\u003c"))
    return page.replace(_MODEL, packed).encode()


def open_page(data: bytes) -> Callable[[np.ndarray], Mapping[str, np.ndarray]]:
    """Load a page's graph in onnxruntime: a function from images to outputs by name."""
    found = _MODEL_BLOCK.search(data.decode())
    if found is None:
        raise UserError("the page holds no model")
    return open_onnx(gzip.decompress(base64.b64decode(found[1])))


def read_template() -> str:
    """The page without a model. Raises `UserError` if it is not built."""
    try:
        template = TEMPLATE.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            "--format html needs the page's template, which this installation lacks: run make web in the checkout "
            "(it needs Node.js 20 or later and npm), or install a released wheel"
        ) from None
    if not all(template.count(token) == 1 for token in (_FACTS, _MODEL)):
        raise UserError(f"{TEMPLATE} is not the page's template of this version: run make web again")
    return template
