"""The commonest radiograph file, a plain 8-bit grey PNG, decoded on all cores: Pillow's decoder holds Python's lock.

TensorStore, which Orbax brings along, decodes in threads of its own. Whatever is special about a file, or wrong with
it, is left to Pillow.
"""

import struct

import numpy as np
from PIL import Image

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TURNING = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
"""Chunks that may say how the image is to be turned."""


def decode_plain_png(data: bytes) -> np.ndarray | None:
    """(H, W) uint8; None for any other file, one that may have to be turned upright, and a damaged one."""
    if not data.startswith(_SIGNATURE) or data[12:16] != b"IHDR" or len(data) < 33:
        return None
    width, height, *kind = struct.unpack(">II5B", data[16:29])
    if kind != [8, 0, 0, 0, 0] or not 0 < width * height <= (Image.MAX_IMAGE_PIXELS or 1 << 62):
        return None
    if any(chunk in data for chunk in _TURNING):
        return None
    try:
        import tensorstore

        context = tensorstore.Context()
        tensorstore.KvStore.open({"driver": "memory"}, context=context).result().write("x", data).result()
        spec = {"driver": "png", "kvstore": {"driver": "memory", "path": "x"}}
        pixels = np.asarray(tensorstore.open(spec, context=context, open=True).result().read().result())
    except Exception:  # Pillow's message is the better one
        return None
    return pixels[:, :, 0] if pixels.shape == (height, width, 1) and pixels.dtype == np.uint8 else None
