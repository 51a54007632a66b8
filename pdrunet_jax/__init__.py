"""PDR-UNet in JAX: bone segmentation in X-ray images, with parity tests against PyTorch.

    model = pdrunet_jax.load_model("runs/mura")        # or .safetensors, or a public .pth
    logits = model(images)                             # (N, H, W, C) in [0, 1] -> (N, H, W, K)
    result = pdrunet_jax.segment(model, "xray.png")    # .mask, .probability, .spacing

Names are imported on first use, so that commands start quickly and handle signals from the start.
"""

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pdrunet_jax.model.load import load_model
    from pdrunet_jax.model.network import PDRUNet
    from pdrunet_jax.predict.inference import segment

    __version__: str

__all__ = ["PDRUNet", "__version__", "load_model", "segment"]

_MODULES = {"PDRUNet": "model.network", "load_model": "model.load", "segment": "predict.inference"}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        try:
            return metadata.version("pdrunet-jax")
        except metadata.PackageNotFoundError:  # run from a checkout that is not installed
            return "unknown"
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
