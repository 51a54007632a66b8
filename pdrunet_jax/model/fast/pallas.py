"""A 3x3 convolution as one GPU kernel with the passes around it, forward and backward: Pallas, lowered to Triton.

docs/pallas.md describes the layout, the fusions and what is not known about them. Activations stay in the ordinary
layout; a kernel reads the phases of `fast/phases.py` by their addresses. The dilation is an argument of the kernels, so
that all layers of a network share a few programs.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.typing import DTypeLike

from pdrunet_jax.model.fast.block import BackwardNorm, Norm
from pdrunet_jax.model.fast.pallas_tiles import Channels, Tiles, padded
from pdrunet_jax.model.sharding import psum, pvary
from pdrunet_jax.runtime.errors import UserError

INTERPRET = False
"""Run the kernels as ordinary JAX operations, on any device: for tests, since it is slow. In float64 they always do."""

HALF, FULL = (128, 32, 64), (32, 32, 16)
"""For dtypes of two bytes, and of four or more: pixels of a tile of the forward kernel and of the gradient kernel, and
most input channels of a program of the gradient kernel, which holds nine matrices of filter gradients in registers."""

PROGRAMS = 264
"""Most programs of the gradient kernel, each with partial filter gradients: two for each multiprocessor of an H100."""


def require_nvidia() -> None:
    """Raise `UserError` unless the kernels can run: on NVIDIA GPUs, or interpreted."""
    if INTERPRET:
        return
    platform = jax.default_backend()
    if platform == "gpu" and "rocm" in jax.devices()[0].client.platform_version.lower():
        platform = "GPU of AMD"
    if platform != "gpu":
        raise UserError(f"model.conv = pallas runs on NVIDIA GPUs only, not on a {platform}; use model.conv = auto")


def _dot(a: jax.Array, b: jax.Array, axes: tuple[int, int], dtype: DTypeLike) -> jax.Array:
    """Product of two matrices summed over these axes, in the precision that JAX is set to."""
    return lax.dot_general(a, b, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=dtype)


def _weights(ref: Any, row: Any, column: Any, inputs: Channels, outputs: Channels) -> jax.Array:
    at = ref.at[row, column, inputs.place[:, None], outputs.place[None]]
    return triton.load(at, mask=inputs.used[:, None] & outputs.used[None], other=0)


def accumulator(dtype: DTypeLike) -> jnp.dtype[Any]:
    """Dtype of sums: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def _forward_kernel(refs: Mapping[str, Any], *, pixels: int) -> None:
    """One tile of z = conv(y): y = x or relu(norm(x)); with `sums` their moments, with `bias` relu(z + bias + skip)."""
    x, kernel, z = refs["x"], refs["kernel"], refs["z"]
    dtype = accumulator(x.dtype)
    inputs, outputs = Channels.of(kernel.shape[2]), Channels.of(kernel.shape[3])
    tiles, program = _tiles(refs), pl.program_id(0)
    here = tiles.place(program, x.shape, pixels)
    norm = Norm(*(inputs.vector(refs[name]) for name in Norm._fields)) if "mean" in refs else None

    def tap(index: jax.Array, total: jax.Array) -> jax.Array:
        i, j = lax.div(index, jnp.int32(3)), lax.rem(index, jnp.int32(3))
        y, mask = here.shifted((i - 1) * tiles.dilation, (j - 1) * tiles.dilation).load(x, inputs)
        if norm is not None:
            y = jnp.where(mask, jnp.maximum(normalise(y.astype(dtype), norm), 0), 0).astype(x.dtype)
        return total + _dot(y, _weights(kernel, i, j, inputs, outputs), (1, 0), dtype)

    total = lax.fori_loop(jnp.int32(0), jnp.int32(9), tap, jnp.zeros((pixels, padded(kernel.shape[3])), dtype))
    if "bias" in refs:
        total = total + outputs.vector(refs["bias"]).astype(dtype)
        if "skip" in refs:
            total = total + here.load(refs["skip"], outputs)[0].astype(dtype)
        total = jnp.maximum(total, 0)
    here.store(z, outputs, total)
    if "sums" in refs:
        # Relative to the mean of the tile, so that a large mean costs no precision; of the values as they are stored.
        inside = here.inside[:, None] & outputs.used[None]
        values = jnp.where(inside, total.astype(z.dtype).astype(dtype), 0)
        count = here.inside.astype(dtype).sum(0)
        mean = values.sum(0) / jnp.maximum(count, 1)
        apart = jnp.where(inside, values - mean[None], 0)
        outputs.store(refs["sums"], program, (mean, (apart * apart).sum(0), jnp.where(outputs.used, count, 0)))


def _tiles(refs: Mapping[str, Any]) -> Tiles:
    return Tiles(*(refs["tiles"][place] for place in range(len(Tiles._fields))))


def normalise(z: jax.Array, norm: Norm) -> jax.Array:
    """Normalise (..., C); `norm` must broadcast."""
    return (z - norm.mean) * norm.factor + norm.shift


def _gradient_kernel(refs: Mapping[str, Any], *, pixels: int, most: int, add_gradient: bool) -> None:
    """Gradients of z = conv(y) in all tiles of a program: of the input, and of the filters, summed over the tiles.

    They are for one block of input channels. The gradient of z is `g`, taken through a normalisation with a
    `BackwardNorm`. y is x or relu(norm(x)); then the gradient of norm(x) is computed, and its sums. `skip`, or `g`
    itself with `add_gradient`, is added before the ReLU.
    """
    g, x, kernel, d_x = (refs[name] for name in ("g", "x", "kernel", "d_x"))
    dtype = accumulator(x.dtype)
    inputs = Channels.of(kernel.shape[2], most, pl.program_id(1))
    outputs, tiles, program = Channels.of(kernel.shape[3]), _tiles(refs), pl.program_id(0)
    back = (
        BackwardNorm(refs["z"], *(outputs.vector(refs[f"z_{name}"]) for name in BackwardNorm._fields[1:]))
        if "z" in refs
        else None
    )
    norm = Norm(*(inputs.vector(refs[name]) for name in Norm._fields)) if "mean" in refs else None

    def tile(index: jax.Array, carry: Any) -> Any:
        d_kernel, *sums = carry
        here = tiles.place(index * pl.num_programs(0) + program, x.shape, pixels)
        x_values, mask = here.load(x, inputs)
        y, before = x_values, None
        if norm is not None:
            before = normalise(x_values.astype(dtype), norm)
            y = jnp.where(mask, jnp.maximum(before, 0), 0).astype(x.dtype)
        total = jnp.zeros(y.shape, dtype)
        products = []
        for tap in range(9):
            i, j = divmod(tap, 3)
            there = here.shifted((1 - i) * tiles.dilation, (1 - j) * tiles.dilation)
            d_z, inside = there.load(g, outputs)
            if back is not None:
                centred = there.load(back.z, outputs)[0].astype(dtype) - back.mean
                d_z = back.factor * d_z.astype(dtype) - back.slope * centred - back.offset
                d_z = jnp.where(inside, d_z, 0).astype(g.dtype)
            total = total + _dot(d_z, _weights(kernel, i, j, inputs, outputs), (1, 1), dtype)
            products.append(d_kernel[tap] + _dot(y, d_z, (0, 0), dtype))
        if add_gradient or "skip" in refs:
            total = total + here.load(g if add_gradient else refs["skip"], inputs)[0].astype(dtype)
        if norm is not None and before is not None:
            total = jnp.where(mask & (before > 0), total, 0).astype(d_x.dtype).astype(dtype)
            centred = jnp.where(mask, x_values.astype(dtype) - norm.mean, 0)
            sums = [sums[0] + total.sum(0), sums[1] + (total * centred).sum(0)]
        here.store(d_x, inputs, total)
        return (tuple(products), *sums)

    sides = inputs.place.shape[0], padded(kernel.shape[3])
    start = ((jnp.zeros(sides, dtype),) * 9, *(jnp.zeros(sides[0], dtype),) * (2 if norm is not None else 0))
    d_kernel, *sums = lax.fori_loop(jnp.int32(0), tiles.trips, tile, start)
    mask = inputs.used[:, None] & outputs.used[None]
    for tap in range(9):
        at = refs["d_kernel"].at[program, tap, inputs.place[:, None], outputs.place[None]]
        triton.store(at, d_kernel[tap], mask=mask)
    if sums:
        inputs.store(refs["sums"], program, tuple(sums))


def _call(
    kernel: Callable[..., None],
    grid: tuple[int, ...],
    operands: Mapping[str, jax.Array | None],
    results: Mapping[str, tuple[tuple[int, ...], DTypeLike]],
    warps: int,
    **options: Any,
) -> dict[str, jax.Array]:
    """Run a kernel, which takes its operands and results by name and addresses them as a whole."""
    given = {name: pvary(array) for name, array in operands.items() if array is not None}
    shapes = tuple((shape, jnp.dtype(dtype)) for shape, dtype in results.values())
    interpret = INTERPRET or given["x"].dtype == jnp.float64
    call = partial(_compiled, kernel, grid, (*given, *results), shapes, warps, tuple(options.items()), interpret)
    return dict(zip(results, call(*given.values()), strict=True))


# Compiled by itself, so that layers with the same shapes are traced once.
@partial(jax.jit, static_argnums=range(7))
def _compiled(
    kernel: Callable[..., None],
    grid: tuple[int, ...],
    names: tuple[str, ...],
    results: tuple[tuple[tuple[int, ...], Any], ...],
    warps: int,
    options: tuple[tuple[str, Any], ...],
    interpret: bool,
    *given: jax.Array,
) -> Any:
    varying = jax.typeof(given[-1]).manual_axis_type
    # Loading ahead needs twice the shared memory; in four bytes more than an A100 has.
    stages = 2 if given[names.index("x")].dtype.itemsize == 2 else 1
    return pl.pallas_call(
        lambda *refs: kernel(dict(zip(names, refs, strict=True)), **dict(options)),
        grid=grid,
        out_shape=[jax.ShapeDtypeStruct(*result, manual_axis_type=varying) for result in results],
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
        name=kernel.__name__.strip("_"),
    )(*given)


def forward(
    x: jax.Array,
    kernel: jax.Array,
    dilation: int,
    *,
    norm: Norm | None = None,
    bias: jax.Array | None = None,
    skip: jax.Array | None = None,
    sums: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Convolve relu(norm(x)), or `x` without `norm`, both (N, H, W, C), with `kernel` (3, 3, C, K), zero padded.

    Returns (N, H, W, K): the result, or with a `bias` (K,) relu(result + bias + skip). With `sums` also an array
    (tiles, 3, K) for `moments`.
    """
    pixels, warps = (HALF[0], 4) if x.dtype.itemsize == 2 else (FULL[0], 8)
    tiles = Tiles.of(x.shape, dilation, pixels)
    programs, outputs = x.shape[0] * tiles.number, kernel.shape[3]
    operands = {"tiles": jnp.asarray(tiles, jnp.int32), "x": x, "kernel": kernel, "bias": bias, "skip": skip}
    results: dict[str, Any] = {"z": ((*x.shape[:3], outputs), x.dtype)}
    if sums:
        results["sums"] = (programs, 3, outputs), accumulator(x.dtype)
    named = {} if norm is None else norm._asdict()
    found = _call(_forward_kernel, (programs,), operands | named, results, warps, pixels=pixels)
    return found["z"], found.get("sums")


def moments(sums: jax.Array, pixels: int) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance of each channel, (K,), from the sums of `forward` over `pixels` pixels of all devices.

    Chan's formula: squares relative to each tile's mean, and those means relative to the mean of all.
    """
    means, squares, counts = sums[:, 0], sums[:, 1], sums[:, 2]
    mean = psum((means * counts).sum(0)) / pixels
    return mean, psum((squares + counts * jnp.square(means - mean[None])).sum(0)) / pixels


def gradients(
    g: jax.Array,
    x: jax.Array,
    kernel: jax.Array,
    dilation: int,
    *,
    back: BackwardNorm | None = None,
    norm: Norm | None = None,
    skip: jax.Array | None = None,
    add_gradient: bool = False,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array] | None]:
    """Compute the gradients of `forward` without bias, from the gradient `g` (N, H, W, K) of its result.

    With `back`, `g` is the gradient of the result's normalisation. With `norm`, the gradient of the input is that of
    norm(x), before the ReLU. `skip` (N, H, W, C), or with `add_gradient` g itself, is added before the ReLU.

    Returns the gradients of the input and of the kernel, and with `norm` the sums over all pixels of the former, and of
    the former times (x - mean), (C,) each.
    """
    _, pixels, most = HALF if x.dtype.itemsize == 2 else FULL
    tiles = Tiles.of(x.shape, dilation, pixels)
    number, inputs = x.shape[0] * tiles.number, x.shape[3]
    trips = -(-number // PROGRAMS)
    programs, dtype = -(-number // trips), accumulator(x.dtype)
    tiles = tiles._replace(trips=trips)
    operands = {"tiles": jnp.asarray(tiles, jnp.int32), "x": x, "kernel": kernel, "g": g, "skip": skip}
    if back is not None:
        operands |= {f"z_{name}".replace("z_z", "z"): value for name, value in back._asdict().items()}
    if norm is not None:
        operands |= norm._asdict()
    results: dict[str, Any] = {
        "d_x": (x.shape, x.dtype),
        "d_kernel": ((programs, 9, *kernel.shape[2:]), dtype),
    }
    if norm is not None:
        results["sums"] = (programs, 2, inputs), dtype
    options = {"pixels": pixels, "most": most, "add_gradient": add_gradient}
    grid = programs, -(-inputs // min(most, padded(inputs)))
    found = _call(_gradient_kernel, grid, operands, results, 8, **options)
    d_kernel = psum(found["d_kernel"].sum(0)).reshape(kernel.shape).astype(kernel.dtype)
    if norm is None:
        return found["d_x"], d_kernel, None
    sums = psum(found["sums"].sum(0))
    return found["d_x"], d_kernel, (sums[0], sums[1])


def _convolution(x: jax.Array, kernel: jax.Array, dilation: int) -> jax.Array:
    return forward(x, kernel, dilation)[0]


def _layer(x: jax.Array, kernel: jax.Array, bias: jax.Array, skip: jax.Array | None, dilation: int) -> jax.Array:
    return forward(x, kernel, dilation, bias=bias, skip=skip)[0]


def _layer_gradient(dilation: int, saved: Any, g: jax.Array) -> Any:
    x, kernel, bias, skip_mark, out = saved
    g = jnp.where(out > 0, g, 0)
    d_x, d_kernel, _ = gradients(g, x, kernel, dilation)
    d_bias = psum(g.astype(bias.dtype).sum((0, 1, 2)))
    return d_x, d_kernel, d_bias, None if skip_mark is None else g


convolution = jax.custom_vjp(_convolution, nondiff_argnums=(2,))
convolution.__doc__ = """Convolve `x` (N, H, W, C) with `kernel` (3, 3, C, K), zero padded, at `dilation`."""
convolution.defvjp(
    lambda x, kernel, dilation: (_convolution(x, kernel, dilation), (x, kernel)),
    lambda dilation, saved, g: gradients(g, saved[0], saved[1], dilation)[:2],
)

layer = jax.custom_vjp(_layer, nondiff_argnums=(4,))
layer.__doc__ = """relu(conv(x) + bias + skip), the layer without normalisation or with a folded one.

Args, in order: x (N, H, W, C), kernel (3, 3, C, K), bias (K,), skip (N, H, W, K) or None, dilation.
"""


def _layer_forward(x: jax.Array, kernel: jax.Array, bias: jax.Array, skip: jax.Array | None, dilation: int) -> Any:
    out = _layer(x, kernel, bias, skip, dilation)
    return out, (x, kernel, bias, None if skip is None else jnp.zeros(()), out)


layer.defvjp(_layer_forward, _layer_gradient)
