"""PDR-UNet in JAX: bone segmentation in X-ray images, with PyTorch parity proven number by number.

    model = pdrunet_jax.load_model("runs/mura")        # or .safetensors, or a public .pth
    logits = model(images)                             # (N, H, W, C) in [0, 1] -> (N, H, W, K)
    result = pdrunet_jax.predict(model, "xray.png")    # .mask, .probability, .spacing

The names are imported when they are first used, so that commands start, and mind signals, at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pdrunet_jax.model.load import load_model
    from pdrunet_jax.model.network import PDRUNet
    from pdrunet_jax.predict.inference import Prediction, predict

__all__ = ["PDRUNet", "Prediction", "load_model", "predict"]

_MODULES = {
    "PDRUNet": "model.network",
    "Prediction": "predict.inference",
    "load_model": "model.load",
    "predict": "predict.inference",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
