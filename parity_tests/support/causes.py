"""Known porting mistakes: what a Flax module may do otherwise than PyTorch, and how PyTorch can imitate it."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Arguments = dict[str, Any]
Run = Callable[..., Tensor]
"""PyTorch's own function, with named arguments."""

_NORM = ("weight", "bias", "eps")
FUNCTIONS: dict[str, tuple[str, ...]] = {
    "batch_norm": ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    "group_norm": ("input", "num_groups", *_NORM),
    "layer_norm": ("input", "normalized_shape", *_NORM),
    "conv2d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "conv_transpose2d": ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
    "max_pool2d": ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    "avg_pool2d": (
        "input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"
    ),
    "interpolate": ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias"),
    "linear": ("input", "weight", "bias"),
    "gelu": ("input", "approximate"),
    "leaky_relu": ("input", "negative_slope"),
    "flatten": ("input", "start_dim", "end_dim"),
    "reshape": ("input",),
    "view": ("input",),
}  # fmt: skip
"""Functions that can be carried out differently, with the names of their arguments."""

NORMS = ("batch_norm", "group_norm", "layer_norm")
KERNELS = ("conv2d", "conv_transpose2d", "linear")


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a function of PyTorch in a forward pass."""

    site: str
    """Module and function, and the number of the call if the module calls the function more than once."""
    function: str
    arguments: Mapping[str, Any]
    """Tensors are replaced by their shapes."""


class Cause(NamedTuple):
    """A kind of mistake."""

    functions: tuple[str, ...]
    """The functions that it concerns."""
    values: Callable[[Call], Sequence[Any]]
    """What a port may have instead, for one call."""
    imitate: Callable[[Run, Arguments, Any], Tensor]
    """Carry out a function with such a value."""
    says: Callable[[Call, Any], str]
    """What the port does, and what PyTorch does."""
    remedy: str


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _set(name: str) -> Callable[[Run, Arguments, Any], Tensor]:
    return lambda run, given, value: run(**{**given, name: value})


def _others(name: str, values: Sequence[Any]) -> Callable[[Call], list[Any]]:
    return lambda call: [value for value in values if value != call.arguments.get(name)]


def _biased(run: Run, given: Arguments, _: Any) -> Tensor:
    """Batch normalisation that stores the biased variance."""
    var, rate, pixels = given.get("running_var"), given.get("momentum", 0.1), given["input"].numel()
    before = None if var is None else var.clone()
    output = run(**given)
    if var is not None and before is not None and given.get("training"):
        count, kept = pixels // var.numel(), (1 - rate) * before
        with torch.no_grad():
            var.copy_(kept + (var - kept) * ((count - 1) / count))
    return output


def _other_mode(run: Run, given: Arguments, _: Any) -> Tensor:
    """Batch normalisation with the running statistics in training, and with the batch's in evaluation."""
    copies = {name: given[name].clone() for name in ("running_mean", "running_var") if given.get(name) is not None}
    return run(**{**given, **copies, "training": not given.get("training")})


def _same(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """What XLA's "SAME" adds before and after."""
    total = max((math.ceil(size / stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


def _padded(run: Run, given: Arguments, value: str) -> Tensor:
    """A convolution or a pooling with XLA's "SAME" or "VALID"."""
    x, pooling = given["input"], "kernel_size" in given
    kernel = _pair(given["kernel_size"]) if pooling else tuple(given["weight"].shape[2:])
    stride = _pair(given.get("stride") or (kernel if pooling else 1))
    dilation = _pair(given.get("dilation", 1))
    if value == "SAME":
        sides = [_same(*each) for each in zip(x.shape[2:], kernel, stride, dilation, strict=True)]
        x = F.pad(x, (*sides[1], *sides[0]), value=float("-inf") if pooling else 0.0)
    return run(**{**given, "input": x, "padding": 0})


def _transposed_padding(run: Run, given: Arguments, value: str) -> Tensor:
    """A transposed convolution with XLA's "SAME" or "VALID"."""
    whole = run(**{**given, "bias": None, "padding": 0, "output_padding": 0})
    cut: list[int] = []
    for size, stride, dilation in zip(
        given["weight"].shape[2:], _pair(given.get("stride", 1)), _pair(given.get("dilation", 1)), strict=True
    ):
        k = (size - 1) * dilation + 1
        total = k + stride - 2 + (max(k - stride, 0) if value == "VALID" else 0)
        low = k - 1 if value == "VALID" or stride > k - 1 else math.ceil(total / 2)
        cut = [low - (k - 1), total - low - (k - 1), *cut]
    output = F.pad(whole, cut)
    bias = given.get("bias")
    return output if bias is None else output + bias[:, None, None]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "mirrored": lambda kernel: kernel.flip((2, 3)),
    "with height and width swapped": lambda kernel: kernel.transpose(2, 3),
    "with inputs and outputs swapped": lambda kernel: kernel.transpose(0, 1),
}


def _layouts(call: Call) -> list[str]:
    shape = call.arguments["weight"]
    spatial = ["mirrored"] * (max(shape[2:], default=1) > 1)
    swapped = ["with height and width swapped"] * (len(shape) == 4 and shape[2] == shape[3] > 1)
    return spatial + swapped + ["with inputs and outputs swapped"] * (shape[0] == shape[1])


def _relaid(run: Run, given: Arguments, value: str) -> Tensor:
    return run(**{**given, "weight": LAYOUTS[value](given["weight"])})


def _channels_last(run: Run, given: Arguments, _: Any) -> Tensor:
    """Flatten (N, C, H, W) in the order (N, H, W, C)."""
    x, plain = given["input"], run(**given)
    return x.permute(0, 2, 3, 1).reshape(plain.shape) if x.ndim == 4 and plain.ndim == 2 else plain


def _resizes(call: Call) -> list[dict[str, Any]]:
    given = call.arguments
    if given.get("mode") in ("bilinear", "bicubic"):
        other = {name: not given.get(name) for name in ("align_corners", "antialias")}
        return [*({name: value} for name, value in other.items()), other]
    return [{"mode": mode} for mode in ("nearest-exact", "nearest") if mode != given.get("mode", "nearest")]


def _is(name: str) -> Callable[[Call, Any], str]:
    return lambda call, value: f"{name} is {value:g}, in PyTorch {call.arguments.get(name, 0.1):g}"


def _padding_says(call: Call, value: str) -> str:
    extra = f", output_padding={call.arguments['output_padding']}" if "output_padding" in call.arguments else ""
    return f"it pads as XLA's {value!r} does, PyTorch with padding={call.arguments.get('padding', 0)}{extra}"


def _named(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value or False}" for name, value in settings.items())


CAUSES: dict[str, Cause] = {
    "epsilon": Cause(
        NORMS,
        _others("eps", (1e-3, 1e-6, 1e-5, 1e-4, 1e-2, 1e-7, 1e-8, 1e-12, 0.0)),
        _set("eps"),
        _is("eps"),
        "Give epsilon: Flax's layers have defaults of their own, 1e-5 in BatchNorm and 1e-6 in the others",
    ),
    "momentum": Cause(
        ("batch_norm",),
        lambda call: (
            _others("momentum", (0.01, 0.9, 0.001, 0.05, 0.1, 0.003, 0.02, 0.2, 0.5, 0.99))(call)
            if call.arguments.get("training")
            else []
        ),
        _set("momentum"),
        lambda call, value: (
            f"the running statistics take {value:g} of a new batch, in PyTorch {call.arguments.get('momentum', 0.1):g}"
        ),
        "PyTorch counts the weight of the new batch, Flax of the old statistics (default 0.99): give 1 - momentum",
    ),
    "unbiased variance": Cause(
        ("batch_norm",),
        lambda call: [True] if call.arguments.get("training") else [],
        _biased,
        lambda call, value: "the running variance averages the biased variance, in PyTorch the unbiased one",
        "Multiply the variance by n / (n - 1) before it enters the running variance, not for the normalisation",
    ),
    "mode": Cause(
        ("batch_norm",),
        lambda call: [True],
        _other_mode,
        lambda call, value: (
            f"it normalises with the {'running' if call.arguments.get('training') else 'batch'} statistics, PyTorch "
            f"with the {'batch' if call.arguments.get('training') else 'running'} ones"
        ),
        "Call model.train() or model.eval(), or pass use_running_average",
    ),
    "groups": Cause(
        ("group_norm",),
        lambda call: [n for n in range(1, call.arguments["input"][1] + 1) if call.arguments["input"][1] % n == 0],
        _set("num_groups"),
        lambda call, value: f"there are {value} groups, in PyTorch {call.arguments['num_groups']}",
        "Give num_groups",
    ),
    "padding": Cause(
        ("conv2d", "max_pool2d"),
        lambda call: ["SAME", "VALID"],
        _padded,
        _padding_says,
        "Give the padding before and after each side; with a stride, 'SAME' pads more after than before",
    ),
    "padding of a transposed convolution": Cause(
        ("conv_transpose2d",),
        lambda call: ["SAME", "VALID"],
        _transposed_padding,
        _padding_says,
        "Pad each side by dilation * (size - 1) - padding, and output_padding more after it",
    ),
    "kernel layout": Cause(
        KERNELS,
        _layouts,
        _relaid,
        lambda call, value: f"its kernel is used {value}",
        "Correct the layout in the table of names; the kernel of a transposed convolution is mirrored between the two",
    ),
    "resize": Cause(
        ("interpolate",),
        _resizes,
        lambda run, given, value: run(**{**given, **value}),
        lambda call, value: (
            f"it resizes as with {_named(value)}, PyTorch with {_named({k: call.arguments.get(k) for k in value})}"
        ),
        "jax.image.resize has no align_corners, and smooths when it makes images smaller unless antialias=False",
    ),
    "pooling at the border": Cause(
        ("avg_pool2d",),
        lambda call: [not call.arguments.get("count_include_pad", True)],
        _set("count_include_pad"),
        lambda call, value: f"zeros of the padding are {'' if value else 'not '}counted, in PyTorch otherwise",
        "Give count_include_pad",
    ),
    "approximate GELU": Cause(
        ("gelu",),
        lambda call: ["none" if call.arguments.get("approximate") == "tanh" else "tanh"],
        _set("approximate"),
        lambda call, value: f"GELU is computed with approximate={value!r}",
        "Give approximate: jax.nn.gelu approximates by default, torch.nn.GELU does not",
    ),
    "slope": Cause(
        ("leaky_relu",),
        _others("negative_slope", (0.01, 0.1, 0.2, 0.3)),
        _set("negative_slope"),
        lambda call, value: f"the slope below zero is {value:g}",
        "Give negative_slope",
    ),
    "flatten order": Cause(
        ("flatten", "reshape", "view"),
        lambda call: [True] if len(call.arguments["input"]) == 4 else [],
        _channels_last,
        lambda call, value: "pixels are flattened in the order (H, W, C), in PyTorch (C, H, W)",
        "Transpose to (N, C, H, W) before flattening",
    ),
}
"""Mistakes that show in a forward pass, its gradients or its running statistics."""


class OptimizerCause(NamedTuple):
    """A kind of mistake in the settings of an optimizer."""

    values: Callable[[Mapping[str, Any]], Sequence[dict[str, Any]]]
    """What a port may have instead, for the settings of PyTorch's optimizer."""
    remedy: str


def _options(name: str, values: Sequence[Any]) -> Callable[[Mapping[str, Any]], list[dict[str, Any]]]:
    return lambda group: [{name: value} for value in values if name in group and group[name] != value]


def _decays(group: Mapping[str, Any]) -> list[dict[str, Any]]:
    kinds = [False, True] if "decoupled_weight_decay" in group else [None]
    values = sorted({group["weight_decay"], 0.0, 1e-4, 1e-2, 1e-3, 1e-5, 0.05, 0.1})
    now = (group.get("decoupled_weight_decay"), group["weight_decay"])
    every = [(kind, value) for kind in kinds for value in values if (kind, value) != now]
    every.sort(key=lambda each: each[1] != now[1])  # only the kind changes: first
    return [
        {"weight_decay": value} | ({} if kind is None else {"decoupled_weight_decay": kind}) for kind, value in every
    ]


def _betas(group: Mapping[str, Any]) -> list[dict[str, Any]]:
    if "betas" not in group:
        return []
    first, second = group["betas"]
    pairs = [(b, second) for b in (0.9, 0.5, 0.8, 0.95, 0.0)] + [(first, b) for b in (0.999, 0.99, 0.98, 0.95, 0.9)]
    return [{"betas": pair} for pair in pairs if pair != (first, second)]


OPTIMIZER_CAUSES: dict[str, OptimizerCause] = {
    "Adam's epsilon": OptimizerCause(
        _options("eps", (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-10, 1e-12, 0.0)), "Give eps of the Adam transformation"
    ),
    "weight decay": OptimizerCause(
        _decays,
        "torch.optim.Adam adds decay * parameter to the gradient (L2): optax.add_decayed_weights before scale_by_adam; "
        "AdamW shrinks the parameters (decoupled): after it. optax.adamw's default is 1e-4, PyTorch's 1e-2",
    ),
    "betas": OptimizerCause(_betas, "Give b1 and b2"),
    "momentum of SGD": OptimizerCause(
        lambda group: [
            *_options("nesterov", (True, False))(group),
            *_options("momentum", (0.9, 0.0, 0.99))(group),
        ],
        "Give momentum and nesterov",
    ),
    "learning rate": OptimizerCause(
        lambda group: [{"lr": group["lr"] * factor} for factor in (10, 0.1, 2, 0.5, 100, 0.01)], "Give learning_rate"
    ),
}
"""Mistakes that show in updates and in trainings."""
