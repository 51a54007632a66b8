"""The same network twice: the PyTorch twin and the Flax model on its weights, and one pass of either, named alike."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from pdrunet_jax.compiling import compiler_options
from pdrunet_jax.model import PDRUNet
from pdrunet_jax.weights import from_public, to_public
from pdrunet_torch_ref import PDRUNet as Twin
from pdrunet_torch_ref.model import dropout_masks, tapped

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Case:
    """A network and its input."""

    shortcut: str = "input"
    norm: str = "batch"
    in_channels: int = 1
    outputs: int = 1
    filters: int = 4
    dropout: float = 0.3
    path: str = "plain"
    dtype: str = "float64"
    shape: tuple[int, int, int] = (1, 32, 32)
    """Batch, height, width."""

    def __str__(self) -> str:
        batch, height, width = self.shape
        channels = f"{self.in_channels}-{self.filters}-{self.outputs}"
        return f"{self.shortcut} {self.norm} {channels} {batch}x{height}x{width} {self.path} {self.dtype}"

    @property
    def options(self) -> dict[str, Any]:
        names = ("shortcut", "norm", "in_channels", "outputs", "filters", "dropout")
        return {name: getattr(self, name) for name in names}

    @property
    def optimised(self) -> bool:
        """Is compiled as in production; the others without optimisation, which is much faster (see `compile_case`)."""
        return self.dtype == "float32" and self.shape == Case.shape and self.outputs == 1 and self.path != "polyphase"

    def replace(self, **changes: Any) -> "Case":
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass
class Pass:
    """What one pass leaves, arrays in NHWC order under the public names."""

    activations: Arrays
    logits: np.ndarray
    buffers: Arrays
    loss: float | None = None
    gradients: Arrays | None = None


def make_twin(case: Case, seed: int = 0) -> Twin:
    """The twin with random weights, and affine parameters and statistics that are far from their initial ones."""
    torch.manual_seed(seed)
    twin = Twin(**case.options).to(getattr(torch, case.dtype))
    for module in twin.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.3)
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            module.num_batches_tracked.fill_(3)
    return twin


def state_arrays(twin: torch.nn.Module) -> Arrays:
    """The twin's state dict as NumPy arrays, copied."""
    return {name: value.detach().numpy().copy() for name, value in twin.state_dict().items()}


def make_flax(twin: Twin, case: Case) -> PDRUNet:
    """The Flax model with the twin's weights, by way of `weights.from_public`."""
    imported = from_public(state_arrays(twin), "the twin")
    dtype = jnp.dtype(case.dtype)

    def build() -> PDRUNet:
        return PDRUNet(**case.options, conv=case.path, param_dtype=dtype, rngs=nnx.Rngs(0))

    graph = nnx.graphdef(nnx.eval_shape(build))
    return nnx.merge(graph, *(jax.tree.map(jnp.asarray, state) for state in (imported.params, imported.stats)))


def make_images(case: Case, seed: int = 1) -> np.ndarray:
    """Random images (N, H, W, C) in [0, 1]."""
    return np.random.default_rng(seed).random((*case.shape, case.in_channels)).astype(case.dtype)


def make_masks(case: Case, seed: int = 2) -> list[np.ndarray]:
    """Keep masks of the two dropouts, (N, H, W, filters)."""
    rng = np.random.default_rng(seed)
    return [rng.random((*case.shape, case.filters)) >= case.dropout for _ in range(2)]


def make_target(case: Case, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Random target (N, H, W), float for one output and class indices else, and valid pixels, nine of ten."""
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, max(case.outputs, 2), case.shape)
    valid = rng.random(case.shape) < 0.9
    return classes.astype(case.dtype if case.outputs == 1 else np.int32), valid


def nchw(array: np.ndarray) -> torch.Tensor:
    """A tensor in PyTorch's order of axes."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 1)))


def nhwc(tensor: torch.Tensor) -> np.ndarray:
    """An array in Flax's order of axes."""
    return np.moveaxis(tensor.detach().numpy(), 1, -1).copy()


def torch_target(target: np.ndarray) -> torch.Tensor:
    """A target, or its valid pixels, as PyTorch's losses take them."""
    return torch.from_numpy(target.astype(np.int64) if target.dtype.kind == "i" else target)


def torch_pass(
    twin: Twin, images: np.ndarray, *, train: bool, masks: list[np.ndarray] | None = None, loss: Any = None
) -> Pass:
    """One pass of the twin; `loss(logits)` adds its value and the gradient of every parameter."""
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
        result.gradients = {name: p.grad.numpy().copy() for name, p in twin.named_parameters() if p.grad is not None}
    result.buffers = {name: value.numpy().copy() for name, value in twin.named_buffers() if not name.startswith("e5.")}
    return result


def jax_pass(
    model: PDRUNet,
    images: np.ndarray,
    *,
    train: bool,
    masks: list[np.ndarray] | None = None,
    loss: Any = None,
    optimised: bool = False,
) -> Pass:
    """The same of the Flax model, compiled as one; the running statistics in `model` move on as the twin's do."""
    return make_jax_pass(model, train=train, loss=loss, optimised=optimised)(images, masks)


def make_jax_pass(
    model: PDRUNet, *, train: bool, loss: Any = None, optimised: bool = False
) -> Callable[[np.ndarray, list[np.ndarray] | None], Pass]:
    """`jax_pass` to be repeated on images of one shape: it is compiled once."""
    graph = nnx.graphdef(model)

    def forward(params: Any, stats: Any, images: jax.Array, keep: Any) -> Any:
        inner = nnx.merge(graph, params, stats, copy=True)
        activations: dict[str, jax.Array] = {}
        logits = inner(images, train=train, dropout_masks=keep, tap=activations.__setitem__)
        value = jnp.zeros(()) if loss is None else loss(logits)
        return value, (logits, activations, nnx.state(inner, nnx.BatchStat))

    def without_gradient(params: Any, *rest: Any) -> Any:
        return forward(params, *rest), params

    function = jax.value_and_grad(forward, has_aux=True) if loss is not None else without_gradient
    compiled = compile_case(function, optimised=optimised)

    def run(images: np.ndarray, masks: list[np.ndarray] | None = None) -> Pass:
        params, stats = nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat)
        (value, (logits, activations, stats)), gradients = compiled(params, stats, jnp.asarray(images), masks)
        nnx.update(model, stats)
        named = to_public(gradients, stats, dead_block=False)
        result = Pass(*jax.tree.map(np.asarray, (activations, logits)), {})
        if loss is not None:
            result.loss = float(value)
            result.gradients = {name: array for name, array in named.items() if not _buffer(name)}
        result.buffers = {name: array for name, array in named.items() if _buffer(name)}
        return result

    return run


def compile_case(function: Callable[..., Any], *, optimised: bool = False) -> Any:
    """`jax.jit`, as in production or without the compiler's last optimisations.

    On CPUs, XLA spends up to 40 s on a float64 network and 6 s on a float32 one, nearly all of it on code generation;
    left out, the program is the same and takes a second or two.
    """
    quick = not optimised and jax.default_backend() == "cpu"
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0} if quick else compiler_options())


def _buffer(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))
