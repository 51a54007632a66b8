"""The PyTorch side: NumPy in, NumPy out, in NHWC order.

On a GPU each framework reserves most of the memory and loads its own CUDA libraries, so PyTorch runs in a separate
process. `on_torch(function, ...)` calls a function of this file there, or in this process on a CPU.
"""

import dataclasses
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from parity_tests.support.case import Arrays, Batch, Case, Objective, Pass
from parity_tests.support.imitate import Change, imitated
from pdrunet_torch_ref import TWINS, training
from pdrunet_torch_ref.model import Dropout, dropout_masks, tapped

T = TypeVar("T")

_device = torch.device("cpu")
_pool: ProcessPoolExecutor | None = None


def own_process() -> str:
    """Move PyTorch to another process, on a GPU if it finds one, and return the device's name."""
    global _pool
    if _pool is None:
        _pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_start)
    return _pool.submit(_device_name).result()


def device() -> torch.device:
    """The device that this process computes on."""
    return _device


def end_process() -> None:
    """End the other process; later calls compute in this one."""
    global _pool
    if _pool is not None:
        _pool.shutdown()
        _pool = None


def on_torch(function: Callable[..., T], *arguments: Any) -> T:
    """Call `function(*arguments)`, with a function of this file, in the process where PyTorch runs."""
    return function(*arguments) if _pool is None else _pool.submit(function, *arguments).result()


def exact() -> None:
    """Switch PyTorch to its most exact mode: no TF32, and sums in an order that does not depend on the machine."""
    torch.use_deterministic_algorithms(True, warn_only=_device.type != "cpu")
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = False


def _start() -> None:
    global _device
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by PyTorch's deterministic mode
    _device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    exact()


def _device_name() -> str:
    return torch.cuda.get_device_name() if _device.type == "cuda" else "CPU"


@dataclasses.dataclass(frozen=True)
class TorchHalf:
    """The PyTorch original of a pair. Its functions are found by name in the process where PyTorch runs."""

    build: Callable[[], torch.nn.Module]
    loss: Callable[[Tensor, Any], Tensor]
    """loss(output, target) of a batch."""
    dtype: str = "float64"
    optimizer: Callable[[torch.nn.Module], torch.optim.Optimizer] | None = None
    observed: tuple[str, ...] | None = None
    """Names of the modules whose outputs are compared; None for every block, convolution and normalisation of ours."""
    left_out: tuple[str, ...] = ()
    """Names, or beginnings of names ending in a dot, in the state dict that the Flax module lacks by design."""

    def drawn(self, seed: int = 0) -> torch.nn.Module:
        """Build the module with random weights, affine parameters and statistics, none at its initial value."""
        torch.manual_seed(seed)
        module = self.build().double()  # float64 for every dtype, so that all draw the same weights
        for layer in module.modules():
            if isinstance(layer, NORMS) and layer.weight is not None:
                torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
                torch.nn.init.normal_(layer.bias, 0, 0.3)
            if getattr(layer, "running_mean", None) is not None:
                layer.running_mean.normal_(0, 0.3)
                layer.running_var.uniform_(0.5, 2)
                layer.num_batches_tracked.fill_(3)
        return module.to(getattr(torch, self.dtype))

    def holding(self, arrays: Arrays) -> torch.nn.Module:
        """Build the module with these arrays, on the device; what is left out may be missing."""
        module = self.build().to(getattr(torch, self.dtype))
        tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
        initial = {name: value for name, value in module.state_dict().items() if self.lacking(name)}
        module.load_state_dict({**initial, **tensors}, strict=True)
        return module.to(_device)

    def lacking(self, name: str) -> bool:
        """Whether the Flax module lacks `name` by design."""
        return any(name == each or (each.endswith(".") and name.startswith(each)) for each in self.left_out)


NORMS = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.GroupNorm, torch.nn.LayerNorm)
"""Kinds of layers whose `weight` is a scale."""


def our_torch(case: Case, optimizer: Any = None) -> TorchHalf:
    """The PyTorch half of this project's networks."""
    build, left_out = partial(_build, case), (("e5.",) if case.network == "pdrunet" else ())
    return TorchHalf(build, _our_loss, case.dtype, optimizer, left_out=left_out)


def _build(case: Case) -> torch.nn.Module:
    return TWINS[case.network](**case.options)


def _our_loss(logits: Tensor, objective: Objective) -> Tensor:
    return loss_of(objective)(logits)


def make_twin(case: Case, seed: int = 0) -> torch.nn.Module:
    """Build the twin with random weights, affine parameters and statistics, none at its initial value."""
    return our_torch(case).drawn(seed)


def twin_of(case: Case, arrays: Arrays) -> torch.nn.Module:
    """Build the twin with these arrays, on the device."""
    return our_torch(case).holding(arrays)


def initial_arrays(half: TorchHalf, seed: int = 0) -> Arrays:
    """Arrays of `half.drawn`, by public name."""
    return state_arrays(half.drawn(seed))


def state_arrays(twin: torch.nn.Module) -> Arrays:
    """Copy the twin's state dict to NumPy arrays."""
    return {name: numpy(value) for name, value in twin.state_dict().items()}


def numpy(tensor: Tensor) -> np.ndarray:
    """Copy a tensor to the host."""
    return tensor.detach().cpu().numpy().copy()


def nchw(array: np.ndarray) -> Tensor:
    """Convert an array (N, H, W, C) to a tensor (N, C, H, W); one of fewer axes stays as it is."""
    moved = np.moveaxis(array, -1, 1) if array.ndim > 3 else array
    return torch.from_numpy(np.array(moved, order="C")).to(_device)


def nhwc(tensor: Tensor) -> np.ndarray:
    """Convert a tensor (N, C, H, W) to an array (N, H, W, C); one of fewer axes stays as it is."""
    return np.moveaxis(numpy(tensor), 1, -1).copy() if tensor.ndim > 3 else numpy(tensor)


def place(array: np.ndarray) -> Tensor:
    """Convert a target, or its valid pixels, to a tensor for PyTorch's losses."""
    copy = array.astype(np.int64) if array.dtype.kind == "i" else np.array(array, order="C")
    return torch.from_numpy(copy).to(_device)


def loss_of(objective: Objective) -> Callable[[Tensor], Tensor]:
    """The twin's loss; "torch bce" and "torch ce" call torch.nn.functional directly."""
    target, valid = place(objective.target), place(objective.valid)
    if objective.name == "torch bce":
        return lambda logits: F.binary_cross_entropy_with_logits(logits[:, 0], target)
    if objective.name == "torch ce":
        return lambda logits: F.cross_entropy(logits, target, ignore_index=255)
    loss = training.make_loss(objective.name, objective.outputs, class_weights=objective.class_weights)
    return lambda logits: loss(logits, target, valid)


def weighted_entropy(
    kind: str, logits: np.ndarray, target: np.ndarray, weights: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Value and gradient of PyTorch's own weighted losses. Logits are (N, H, W), or (N, H, W, K) for "ce"."""
    given, truth = place(logits).requires_grad_(), place(target)
    table = given.new_tensor(weights)
    if kind == "ce":
        value = F.cross_entropy(given.movedim(-1, 1), truth.long(), table)
    elif kind == "ce of two":  # the background's logit is 0
        both = torch.stack([torch.zeros_like(given), given], 1)
        value = F.cross_entropy(both, truth.long(), table)
    else:  # BCEWithLogitsLoss divides by the number of pixels; divided by their weights instead
        loss = F.binary_cross_entropy_with_logits(given, truth, pos_weight=table[1] / table[0])
        mean = torch.where(truth == 1, table[1], table[0]).mean()
        value = loss if kind == "mean over pixels" else loss * table[0] / mean
    value.backward()
    assert given.grad is not None
    return numpy(value), numpy(given.grad)


def twin_pass(
    twin: torch.nn.Module,
    images: np.ndarray,
    *,
    train: bool,
    masks: Sequence[np.ndarray] | None = None,
    loss: Callable[[Tensor], Tensor] | None = None,
    half: TorchHalf | None = None,
    changes: Sequence[Change] = (),
    calls: list[Any] | None = None,
) -> Pass:
    """Run one pass of the twin; with `loss`, also compute its value and the gradient of every parameter.

    Args:
        twin: any module.
        images: (N, H, W, C).
        train: training mode.
        masks: keep masks of the dropouts of this project's networks.
        loss: of the output.
        half: what the twin was built from; None for this project's networks.
        changes: mistakes that PyTorch imitates.
        calls: receives PyTorch's functions and the activations as they are computed; see `imitated`.
    """
    activations: Arrays = {}
    half = half or TorchHalf(lambda: twin, _our_loss, left_out=("e5.",))
    twin.train(train)
    twin.zero_grad(set_to_none=True)
    keep = None if masks is None else [nchw(mask) for mask in masks]

    def tap(name: str, value: Tensor) -> None:
        activations[name] = nhwc(value)
        if calls is not None:
            calls.append(name)

    with dropout_masks(twin, keep), _observed(twin, half.observed, tap), imitated(twin, changes, calls):
        logits = twin(nchw(images))
    result = Pass(activations, nhwc(logits), {})
    if loss is not None:
        value = loss(logits)
        value.backward()
        result.loss = float(value.detach())
        result.gradients = {name: numpy(p.grad) for name, p in twin.named_parameters() if p.grad is not None}
    result.buffers = {name: numpy(value) for name, value in twin.named_buffers() if not half.lacking(name)}
    return result


@contextmanager
def _observed(twin: torch.nn.Module, names: Sequence[str] | None, tap: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Context in which forward passes call `tap(name, output)` for the modules of these names."""
    if names is None:
        with tapped(twin, tap):
            yield
        return

    def hook(name: str) -> Callable[..., None]:
        return lambda _module, _inputs, output: tap(name, output)

    handles = [twin.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def network_pass(
    half: TorchHalf,
    arrays: Arrays,
    batches: Sequence[Batch],
    train: bool,
    with_loss: bool = False,
    changes: Sequence[Change] = (),
) -> Pass:
    """Run passes of the original with `arrays`, one after the other; return the last."""
    twin = half.holding(arrays)
    return [_batch_pass(half, twin, batch, train, with_loss, changes) for batch in batches][-1]


def calls_of(half: TorchHalf, arrays: Arrays, batch: Batch, train: bool, changes: Sequence[Change] = ()) -> list[Any]:
    """PyTorch's functions and the activations of a pass in the order of computation; see `imitated`."""
    calls: list[Any] = []
    _batch_pass(half, half.holding(arrays), batch, train, False, changes, calls)
    return calls


def _batch_pass(
    half: TorchHalf,
    twin: torch.nn.Module,
    batch: Batch,
    train: bool,
    with_loss: bool,
    changes: Sequence[Change],
    calls: list[Any] | None = None,
) -> Pass:
    target = place(batch.target) if isinstance(batch.target, np.ndarray) else batch.target
    loss = partial(_of_target, half.loss, target) if with_loss else None
    return twin_pass(
        twin, batch.images, train=train, masks=batch.masks, loss=loss, half=half, changes=changes, calls=calls
    )


def _of_target(loss: Callable[[Tensor, Any], Tensor], target: Any, output: Tensor) -> Tensor:
    return loss(output, target)


def convolutions(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray, dilations: Sequence[int]) -> dict[int, Any]:
    """relu(conv2d(x)) at each dilation; the kernel is OIHW."""
    weight, offset = place(kernel), place(bias)
    return {d: nhwc(torch.relu(F.conv2d(nchw(x), weight, offset, padding=d, dilation=d))) for d in dilations}


def batch_norm(x: np.ndarray, mean: float, deviation: float, train: bool) -> Arrays:
    """relu(BatchNorm2d(x)) with random affine parameters and these running statistics; all arrays before and after."""
    channels = x.shape[-1]
    layer = torch.nn.BatchNorm2d(channels, dtype=torch.from_numpy(x).dtype).train(train)
    torch.manual_seed(0)
    torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
    torch.nn.init.normal_(layer.bias)
    layer.running_mean.fill_(mean)
    layer.running_var.fill_(deviation**2)
    before = state_arrays(layer)
    layer.to(_device)
    output = nhwc(torch.relu(layer(nchw(x))))
    return {**before, "output": output, **{f"new_{name}": array for name, array in state_arrays(layer).items()}}


def blocks(case: Case, arrays: Arrays, inputs: Arrays, train: bool) -> Arrays:
    """Each block by public name on an input of its own."""
    twin = twin_of(case, arrays).train(train)
    return {name: nhwc(twin.get_submodule(name)(nchw(x))) for name, x in inputs.items()}


def dropped(x: np.ndarray, keep: np.ndarray, rate: float) -> np.ndarray:
    """The twin's dropout in training."""
    layer = Dropout(rate).train()
    layer.keep = nchw(keep)
    return nhwc(layer(nchw(x)))


def loss_and_gradient(logits: np.ndarray, objective: Objective) -> tuple[np.ndarray, np.ndarray]:
    """Value and gradient to the logits (N, H, W, K)."""
    tensor = nchw(logits).requires_grad_()
    value = loss_of(objective)(tensor)
    value.backward()
    assert tensor.grad is not None
    return numpy(value), nhwc(tensor.grad)


def resampled(kind: str, x: np.ndarray, weights: Arrays, size: Sequence[int], g: np.ndarray | None) -> Arrays:
    """Halve or double the resolution of `x` with torch.nn's own function; with `g`, its gradients to all inputs too."""
    inputs = {"x": nchw(x), **{name: place(array) for name, array in weights.items()}}
    for tensor in inputs.values():
        tensor.requires_grad_()
    t, kernel, bias = inputs["x"], inputs.get("weight"), inputs.get("bias")
    if kind == "max":
        y = F.max_pool2d(t, 2)
    elif kind == "stride":
        y = F.conv2d(t, kernel, bias, stride=2, padding=1)
    elif kind == "transposed":
        extra = kernel.shape[-1] - 2
        y = F.conv_transpose2d(t, kernel, bias, stride=2, padding=extra, output_padding=extra)
    else:
        y = F.interpolate(t, tuple(size), mode="bilinear", align_corners=kind == "bilinear_corners")
    result = {"output": nhwc(y)}
    if g is not None:
        y.backward(nchw(g))
        result["x"] = nhwc(t.grad)
        result |= {name: numpy(inputs[name].grad) for name in weights}
    return result
