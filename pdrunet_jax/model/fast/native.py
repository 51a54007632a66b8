"""Convolutions with the passes around them in the kernels of `kernels.cc`: on CPUs, in float32 and float64.

Activations are in the row layout, (N, H, C, W): see `fast/phases.py`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pdrunet_jax.model.fast import native_library
from pdrunet_jax.model.fast.block import BackwardNorm, Norm
from pdrunet_jax.runtime.errors import UserError


def require_kernels() -> None:
    """Raise `UserError` unless the kernels can be used on this computer."""
    if jax.default_backend() != "cpu":
        reason: str | None = f"they run on CPUs, not on a {jax.default_backend()}"
    else:
        reason = native_library.problem()
    if reason is not None:
        raise UserError(f"model.conv = native needs its kernels, and {reason}; use model.conv = auto")


def has_kernels(dtype: DTypeLike) -> bool:
    """Whether there are kernels for arrays of `dtype` on this computer."""
    name = jnp.dtype(dtype).name
    return name in native_library.ELEMENTS and native_library.problem(name) is None


def _call(function: str, results: Sequence[tuple[int, ...]], operands: Sequence[jax.Array], **options: Any) -> Any:
    """Call a function of the library. Raises `ValueError` if there is none for the operands' dtype."""
    dtype = operands[0].dtype
    if not has_kernels(dtype):
        raise ValueError(f"the kernels of model.conv = native take float32 and float64, not {dtype}")
    forms = [jax.ShapeDtypeStruct(shape, dtype) for shape in results]
    return jax.ffi.ffi_call(f"{function}_{dtype}", forms)(*operands, **options)


def forward(
    x: jax.Array,
    kernel: jax.Array,
    dilation: int,
    *,
    norm: Norm | None = None,
    bias: jax.Array | None = None,
    added: jax.Array | None = None,
    moments: bool = False,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Compute z = conv(y) with y = x, or relu(norm(x)); with `bias`, relu(z + bias + added).

    Args:
        x: (N, H, C, W).
        kernel: (3, 3, C, K), or (1, 1, C, K).
        dilation: spacing of the kernel's taps in pixels.
        norm: of the C channels of `x`.
        bias: (K,).
        added: (N, H, K, W).
        moments: measure z.

    Returns:
        The result (N, H, K, W), and with `moments` the mean and biased variance of each channel of z, (K,) each.
    """
    n, height, _, width = x.shape
    outputs = kernel.shape[-1]
    operands = _operands(x, kernel, norm, bias, added)
    results = (n, height, outputs, width), (2, outputs)
    z, (mean, var) = _call("pdrunet_forward", results, operands, dilation=np.int64(dilation), moments=moments)
    return z, (mean, var)


def gradients(
    g: jax.Array,
    x: jax.Array,
    kernel: jax.Array,
    dilation: int,
    *,
    back: BackwardNorm | None = None,
    norm: Norm | None = None,
    added: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
    """Gradients of `forward(x, kernel, dilation, norm=norm)` with respect to x and kernel, given that of its result.

    Args:
        g: gradient of the result, or with `back` of what a normalisation makes of it, (N, H, K, W).
        x: (N, H, C, W).
        kernel: as for `forward`.
        dilation: as for `forward`.
        back: the normalisation that follows.
        norm: the normalisation that precedes, together with a ReLU.
        added: a further gradient of the convolution's input, (N, H, C, W).

    Returns:
        The gradient of x; with `norm` before the ReLU, zero where that was closed. The kernel's. With `norm`, the sums
        of the first, and of its products with (x - mean), over all pixels, (C,) each.
    """
    results = x.shape, kernel.shape, (2, x.shape[2])
    z, rest = (None, None) if back is None else (back.z, back[1:])
    operands = _operands(g, z, rest, x, norm, kernel, added, dtype=x.dtype)
    d_x, d_kernel, (first, second) = _call("pdrunet_backward", results, operands, dilation=np.int64(dilation))
    return d_x, d_kernel, (first, second)


def end(z: jax.Array, norm: Norm, skip: jax.Array | None = None, skip_norm: Norm | None = None) -> jax.Array:
    """relu(norm(z) + skip), or relu(norm(z) + relu(skip_norm(skip))); all (N, H, C, W)."""
    (out,) = _call("pdrunet_end", [z.shape], _operands(z, norm, skip, skip_norm))
    return out


def end_gradient(
    d_out: jax.Array, z: jax.Array, norm: Norm, skip: jax.Array | None = None, skip_norm: Norm | None = None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The gradient of `end` before its ReLU, zero where it was closed, given that of its result, (N, H, C, W).

    Also its sums, and those of its products with (z - mean), over all pixels, (C,) each.
    """
    operands = _operands(d_out, z, norm, skip, skip_norm)
    d_y, (first, second) = _call("pdrunet_end_gradient", (z.shape, (2, z.shape[2])), operands)
    return d_y, (first, second)


def _operands(*given: Any, dtype: Any = None) -> list[jax.Array]:
    """Operands of a custom call: vectors of one tuple as rows, and an empty array for one that is left out."""
    dtype = dtype or given[0].dtype
    return [
        jnp.zeros(0, dtype)
        if operand is None
        else (jnp.stack(operand) if isinstance(operand, tuple) else operand).astype(dtype)
        for operand in given
    ]


def _layer(x: jax.Array, kernel: jax.Array, bias: jax.Array, added: jax.Array | None, dilation: int) -> jax.Array:
    return forward(x, kernel, dilation, bias=bias, added=added)[0]


_LayerSaved = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]


def _layer_forward(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, added: jax.Array | None, dilation: int
) -> tuple[jax.Array, _LayerSaved]:
    out = _layer(x, kernel, bias, added, dilation)
    return out, (x, kernel, out, added)


def _layer_backward(
    dilation: int, saved: _LayerSaved, g: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    x, kernel, out, added = saved
    g = jnp.where(out > 0, g, 0)
    d_x, d_kernel, _ = gradients(g, x, kernel, dilation)
    return d_x, d_kernel, g.sum((0, 1, 3)), None if added is None else g


layer = jax.custom_vjp(_layer, nondiff_argnums=(4,))
layer.__doc__ = """relu(conv(x) + bias + added), a layer without normalisation; arguments as for `forward`."""
layer.defvjp(_layer_forward, _layer_backward)


def _convolution(x: jax.Array, kernel: jax.Array, dilation: int) -> jax.Array:
    return forward(x, kernel, dilation)[0]


convolution = jax.custom_vjp(_convolution, nondiff_argnums=(2,))
convolution.__doc__ = """The convolution alone, with its gradients; arguments as for `forward`."""
convolution.defvjp(
    lambda x, kernel, dilation: (_convolution(x, kernel, dilation), (x, kernel)),
    lambda dilation, saved, g: gradients(g, saved[0], saved[1], dilation)[:2],
)
