"""The PyTorch side: NumPy in, NumPy out, in NHWC order.

On a GPU each framework reserves most of the memory and loads its own CUDA libraries, so PyTorch runs in a separate
process. `on_torch(function, ...)` calls a function of this file there, or in this process on a CPU.
"""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from parity_tests.support.case import Arrays, Case, Objective, Pass
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


def make_twin(case: Case, seed: int = 0) -> torch.nn.Module:
    """Build the twin with random weights, affine parameters and statistics, none at its initial value."""
    torch.manual_seed(seed)
    twin = TWINS[case.network](**case.options).double()  # float64 for every dtype, so that all draw the same weights
    for module in twin.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.3)
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            module.num_batches_tracked.fill_(3)
    return twin.to(getattr(torch, case.dtype))


def twin_of(case: Case, arrays: Arrays) -> torch.nn.Module:
    """Build the twin with these arrays, on the device."""
    twin = TWINS[case.network](**case.options).to(getattr(torch, case.dtype))
    twin.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}, strict=True)
    return twin.to(_device)


def state_arrays(twin: torch.nn.Module) -> Arrays:
    """Copy the twin's state dict to NumPy arrays."""
    return {name: numpy(value) for name, value in twin.state_dict().items()}


def numpy(tensor: Tensor) -> np.ndarray:
    """Copy a tensor to the host."""
    return tensor.detach().cpu().numpy().copy()


def nchw(array: np.ndarray) -> Tensor:
    """Convert an array (N, H, W, C) to a tensor (N, C, H, W)."""
    return torch.from_numpy(np.array(np.moveaxis(array, -1, 1), order="C")).to(_device)


def nhwc(tensor: Tensor) -> np.ndarray:
    """Convert a tensor (N, C, H, W) to an array (N, H, W, C)."""
    return np.moveaxis(numpy(tensor), 1, -1).copy()


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


def twin_pass(
    twin: torch.nn.Module,
    images: np.ndarray,
    *,
    train: bool,
    masks: Sequence[np.ndarray] | None = None,
    loss: Callable[[Tensor], Tensor] | None = None,
) -> Pass:
    """Run one pass of the twin; with `loss`, also compute its value and the gradient of every parameter."""
    activations: Arrays = {}
    twin.train(train)
    twin.zero_grad(set_to_none=True)
    keep = None if masks is None else [nchw(mask) for mask in masks]
    with dropout_masks(twin, keep), tapped(twin, lambda name, value: activations.__setitem__(name, nhwc(value))):
        logits = twin(nchw(images))
    result = Pass(activations, nhwc(logits), {})
    if loss is not None:
        value = loss(logits)
        value.backward()
        result.loss = float(value.detach())
        result.gradients = {name: numpy(p.grad) for name, p in twin.named_parameters() if p.grad is not None}
    result.buffers = {name: numpy(value) for name, value in twin.named_buffers() if not name.startswith("e5.")}
    return result


def network_pass(
    case: Case,
    arrays: Arrays,
    inputs: Sequence[tuple[np.ndarray, Sequence[np.ndarray] | None]],
    train: bool,
    objective: Objective | None = None,
) -> Pass:
    """Run passes of the twin with `arrays` on images and dropout masks, one after the other; return the last."""
    twin = twin_of(case, arrays)
    loss = None if objective is None else loss_of(objective)
    return [twin_pass(twin, images, train=train, masks=masks, loss=loss) for images, masks in inputs][-1]


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
