"""Let PyTorch imitate known porting mistakes: if it then gives the Flax module's numbers, that is the mistake.

Every call of one of PyTorch's functions can be carried out with another setting, in the whole network or at one place,
without a change to the module. PyTorch only, so that it runs in the process where PyTorch is.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from parity_tests.support.causes import CAUSES, FUNCTIONS, OPTIMIZER_CAUSES, Arguments, Call, Cause, Run


@dataclasses.dataclass(frozen=True)
class Change:
    """A mistake for PyTorch to imitate: a setting of a function, everywhere or at one site, or of the optimizer."""

    cause: str
    """A key of `CAUSES` or of `OPTIMIZER_CAUSES`."""
    value: Any
    site: str = ""
    """Of a `Call`; "*:" and a function's name for all calls of the function. Not for optimizers."""

    def apply_to(self, optimizer: torch.optim.Optimizer) -> None:
        """Change the settings of `optimizer`, if that is what this is about."""
        if self.cause in OPTIMIZER_CAUSES:
            for group in optimizer.param_groups:
                group.update(self.value)


class _Mode(TorchFunctionMode):
    """Carry out functions with the mistakes of `changes`, and record the calls."""

    def __init__(self, changes: Sequence[Change], calls: list[Any] | None) -> None:
        super().__init__()
        # The last to be applied is the first to see the arguments: plain settings, which `CAUSES` lists first.
        self.changes = sorted(changes, key=lambda change: -list(CAUSES).index(change.cause))
        self.calls = calls
        self.modules: list[str] = [""]
        self.count: dict[str, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name not in FUNCTIONS or not args:
            return func(*args, **kwargs)
        if name in ("reshape", "view", "flatten"):  # their sizes have no names
            given, run = {"input": args[0]}, lambda input: func(input, *args[1:], **kwargs)
        else:
            given = dict(zip(FUNCTIONS[name], args, strict=False)) | kwargs
            run = lambda **named: _positional(func, named)  # noqa: E731
        site = f"{self.modules[-1]}:{name}"
        self.count[site] = self.count.get(site, 0) + 1
        if self.count[site] > 1:
            site += f":{self.count[site]}"
        if self.calls is not None:
            shapes = {key: tuple(v.shape) if isinstance(v, Tensor) else v for key, v in given.items()}
            self.calls.append(Call(site, name, shapes))
        for change in self.changes:
            cause = CAUSES[change.cause]
            if name in cause.functions and change.site in (site, f"*:{name}"):
                run = _wrapped(cause, run, change.value)
        return run(**given)


def _wrapped(cause: Cause, run: Run, value: Any) -> Run:
    return lambda **given: cause.imitate(run, given, value)


def _positional(func: Any, named: Arguments) -> Any:
    """Call `func`, its input by position: methods have no name for it."""
    return func(named["input"], **{key: value for key, value in named.items() if key != "input"})


@contextmanager
def imitated(module: torch.nn.Module, changes: Sequence[Change], calls: list[Any] | None = None) -> Iterator[None]:
    """Context in which PyTorch imitates mistakes in forward passes of `module`.

    Args:
        module: whose parts name the sites.
        changes: the mistakes; those of optimizers have no effect here.
        calls: receives each `Call` in the order of computation.
    """
    if calls is None and not any(change.cause in CAUSES for change in changes):
        yield
        return
    mode = _Mode([change for change in changes if change.cause in CAUSES], calls)

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: mode.modules.append(name)

    def leave(*_: Any) -> None:
        mode.modules.pop()

    def begin(*_: Any) -> None:
        mode.count.clear()

    with ExitStack() as stack:
        stack.callback(module.register_forward_pre_hook(begin).remove)
        for name, part in module.named_modules():
            if name:
                stack.callback(part.register_forward_pre_hook(enter(name)).remove)
                stack.callback(part.register_forward_hook(leave).remove)
        stack.enter_context(mode)
        yield
