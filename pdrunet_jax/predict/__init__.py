"""`python -m pdrunet_jax.predict`; called as a function, `pdrunet_jax.predict(model, image)`."""

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from pdrunet_jax.predict.inference import predict

        return predict(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
