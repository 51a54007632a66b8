"""The Flax model with the twin's weights, and one pass of it, with the twin's names."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from parity_tests.support.case import Arrays, Case, Objective, Pass
from pdrunet_jax.config import LossConfig, ModelConfig
from pdrunet_jax.model.base import Network
from pdrunet_jax.model.build import build
from pdrunet_jax.model.execution import Execution
from pdrunet_jax.model.layers import Tap
from pdrunet_jax.model.weights import from_public, to_public
from pdrunet_jax.runtime.compile import compiler_options
from pdrunet_jax.train.losses import make_loss

How = Literal["optimised", "compiled", "op by op"]
"""One program as in production; one program without the compiler's last optimisations; or each operation by itself,
compiled once for all cases of one shape."""


class FlaxHalf(Protocol):
    """The Flax module of a pair."""

    def build(self, arrays: Arrays) -> nnx.Module:
        """Make the module with the PyTorch original's arrays, by public name."""
        ...

    def call(self, model: Any, images: jax.Array, *, train: bool, masks: Any, tap: Tap) -> jax.Array:
        """Run `model`, and tell `tap` the public name and value of its activations in the order of computation."""
        ...

    def named(self, params: Any, stats: Any) -> Arrays:
        """Arrays of a module, or their gradients, by public name and in the public layout."""
        ...


@dataclasses.dataclass(frozen=True)
class OurFlax:
    """The Flax half of this project's networks."""

    case: Case

    def build(self, arrays: Arrays) -> nnx.Module:
        """See `FlaxHalf`."""
        return make_flax(arrays, self.case)

    @staticmethod
    def call(model: Network, images: jax.Array, *, train: bool, masks: Any, tap: Tap) -> jax.Array:
        """See `FlaxHalf`."""
        execution = dataclasses.replace(Execution.of(model.config.conv), tap=tap)
        return model(images, train=train, dropout_masks=masks, execution=execution)

    @staticmethod
    def named(params: Any, stats: Any) -> Arrays:
        """See `FlaxHalf`."""
        return to_public(params, stats, dead_block=False)


OURS = OurFlax(Case())


def make_flax(arrays: Arrays, case: Case, *, dtype: DTypeLike | None = None) -> Network:
    """Build the Flax model with the twin's arrays, imported with `weights.from_public`; `dtype` as in `Network`."""
    imported = from_public(arrays, "the twin")
    config = ModelConfig(name=case.network, **case.options, conv=case.path)

    def make() -> Network:
        return build(config, dtype=dtype, param_dtype=jnp.dtype(case.dtype), rngs=nnx.Rngs(0))

    graph = nnx.graphdef(nnx.eval_shape(make))
    return nnx.merge(graph, *(jax.tree.map(jnp.asarray, state) for state in (imported.params, imported.stats)))


def loss_of(objective: Objective) -> Callable[[jax.Array], jax.Array]:
    """The loss function of the training step."""
    config = LossConfig(name=objective.name, class_weights=objective.class_weights)
    loss = make_loss(config, objective.outputs)
    target, valid = jnp.asarray(objective.target), jnp.asarray(objective.valid)
    return lambda logits: loss(logits, target, valid)


def jax_pass(
    model: nnx.Module,
    images: np.ndarray,
    *,
    train: bool,
    masks: Sequence[np.ndarray] | None = None,
    loss: Any = None,
    how: How = "compiled",
    half: FlaxHalf = OURS,
) -> Pass:
    """Run one pass, and update the running statistics in `model`."""
    return make_jax_pass(model, train=train, loss=loss, how=how, half=half)(images, masks)


def make_jax_pass(
    model: nnx.Module, *, train: bool, loss: Any = None, how: How = "compiled", half: FlaxHalf = OURS
) -> Callable[[np.ndarray, Sequence[np.ndarray] | None], Pass]:
    """Return `jax_pass` for repeated use on images of one shape: it is compiled once."""
    graph = nnx.graphdef(model)

    def forward(params: Any, parts: Any, images: jax.Array, keep: Any) -> Any:
        inner = nnx.merge(graph, params, *parts, copy=True)
        activations: dict[str, jax.Array] = {}
        logits = half.call(inner, images, train=train, masks=keep, tap=activations.__setitem__)
        value = jnp.zeros(()) if loss is None else loss(logits)
        return value, (logits, activations, nnx.state(inner, nnx.BatchStat))

    def without_gradient(params: Any, *rest: Any) -> Any:
        return forward(params, *rest), params

    function = jax.value_and_grad(forward, has_aux=True) if loss is not None else without_gradient
    program = function if how == "op by op" else compiled(function, optimised=how == "optimised")

    def run(images: np.ndarray, masks: Sequence[np.ndarray] | None = None) -> Pass:
        _, params, *parts = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
        (value, (logits, activations, stats)), gradients = program(params, parts, jnp.asarray(images), masks)
        nnx.update(model, stats)
        named = half.named(gradients, stats)
        result = Pass(*jax.tree.map(np.asarray, (activations, logits)), {})
        if loss is not None:
            result.loss = float(value)
            result.gradients = {name: array for name, array in named.items() if not is_buffer(name)}
        result.buffers = {name: array for name, array in named.items() if is_buffer(name)}
        return result

    return run


def compiled(function: Callable[..., Any], *, optimised: bool = False) -> Any:
    """`jax.jit`, as in production or without the compiler's last optimisations.

    On CPUs, XLA spends up to 40 s on a float64 network and 6 s on a float32 one, nearly all of it on code generation.
    Without that the program is the same and compiles in a second or two.
    """
    quick = not optimised and jax.default_backend() == "cpu"
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0} if quick else compiler_options())


def is_buffer(name: str) -> bool:
    """Whether `name` is a running statistic."""
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))
