"""Ensemble: the networks of all folds as one, which averages their probabilities."""

import hashlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pdrunet_jax.model.base import Network
from pdrunet_jax.model.execution import Execution
from pdrunet_jax.model.layers import split_state
from pdrunet_jax.model.weights import to_public
from pdrunet_jax.runtime.digest import content_digest
from pdrunet_jax.runtime.errors import UserError


class Ensemble(Network):
    """Networks of one kind, used as one: the probability of a pixel is the mean of theirs.

    It predicts as a `Network` does, and is neither trained nor exported.

    Args:
        members: two or more networks with the same options.
    """

    def __init__(self, members: Sequence[Network]) -> None:
        first = members[0]
        for name in ("config", "in_channels", "outputs", "dtype", "size", "fit", "spacing", "mirror", "multilabel"):
            setattr(self, name, getattr(first, name))
        self.count = len(members)
        for number, member in enumerate(members, 1):
            setattr(self, f"fold_{number}", member)

    @property
    def members(self) -> tuple[Network, ...]:
        """The networks, in the order of their folds."""
        return tuple(getattr(self, f"fold_{number}") for number in range(1, self.count + 1))

    @property
    def multiple(self) -> int:
        """As of each member."""
        return self.members[0].multiple

    @property
    def radius(self) -> int:
        """As of each member."""
        return self.members[0].radius

    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool = False,
        dropout_key: jax.Array | None = None,
        dropout_masks: Sequence[jax.Array] | None = None,
        execution: Execution | None = None,
    ) -> jax.Array:
        """Logits (N, H, W, outputs) of `images` (N, H, W, in_channels) in [0, 1]; see `average_logits`.

        Raises `UserError` if asked to train.
        """
        if train or dropout_key is not None or dropout_masks is not None:
            raise UserError("an ensemble predicts; train one of its members")
        logits = [member(images, execution=execution) for member in self.members]
        return average_logits(logits, multilabel=self.multilabel)


def average_logits(logits: Sequence[jax.Array], *, multilabel: bool = False) -> jax.Array:
    """Logits whose probabilities are the means of the probabilities of several `logits`, each (N, H, W, K).

    Computed without overflow, whatever the logits. A single array is returned as it is; a value that is not finite in
    one of them is NaN.
    """
    if len(logits) == 1:
        return logits[0]
    return _averaged(jnp.stack(logits), sigmoid=multilabel or logits[0].shape[-1] == 1)


@partial(jax.jit, static_argnames="sigmoid")
def _averaged(logits: jax.Array, *, sigmoid: bool) -> jax.Array:
    if sigmoid:  # log(p / (1 - p)), where the number of members cancels out
        log_odds = (jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits))
        mean = jax.nn.logsumexp(log_odds[0], axis=0) - jax.nn.logsumexp(log_odds[1], axis=0)
    else:  # log p, up to a constant
        mean = jax.nn.logsumexp(jax.nn.log_softmax(logits, axis=-1), axis=0) - jnp.log(logits.shape[0])
    return jnp.where(jnp.isfinite(logits).all(axis=0), mean, jnp.nan)


def weights_digest(model: Network, wiring: dict[str, Any]) -> str:
    """SHA-256 of the weights of `model`, all members of an ensemble, and of options that arrays do not show."""
    digests = [
        content_digest(to_public(*split_state(member)[1:], dead_block=False), wiring) for member in model.members
    ]
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()
