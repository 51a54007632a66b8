"""Find the state dict of the network in a checkpoint, as training scripts and frameworks save it."""

import re
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

import numpy as np

from pdrunet_jax.runtime.errors import UserError

FIRST = ("std_block.first.weight", "encoder_0.first.weight", "encoder_0.conv1.weight")
LAST = "final_conv.weight"
"""Names by which a state dict is found: a network's first array, or else its last."""

WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Usual keys of a state dict, the first of them before the others."""

AVERAGED = re.compile(r"ema|swa|averag|shadow|teacher", re.IGNORECASE)
"""Keys and prefixes of a moving average, which a checkpoint holds next to the network."""

NOT_NETWORK = re.compile(r"_*(loss|criterion|metric|(train|val|test)_?(loss|metric))", re.IGNORECASE)
"""Beginning of names that belong to a loss or a metric."""

DEEPEST = 5
MOST_LISTED = 20


class StateDict(NamedTuple):
    """A state dict and where it was."""

    keys: tuple[str, ...]
    """Keys of the dictionaries around it."""
    prefix: str
    """What comes before the network's names in it."""
    content: Mapping[Any, Any]

    @property
    def place(self) -> str:
        """Its keys and prefix in one string, for messages."""
        return ".".join((*self.keys, self.prefix.rstrip(".")) if self.prefix else self.keys)

    @property
    def rank(self) -> tuple[bool, int, int]:
        """Of several, the lowest is taken."""
        name = self.keys[-1] if self.keys else ""
        usual = WRAPPERS.index(name) if name in WRAPPERS else len(WRAPPERS)
        return AVERAGED.search(self.place) is not None, len(self.keys), usual


def find_state_dict(content: Mapping[str, Any], source: str) -> tuple[dict[str, Any], list[str]]:
    """Find the network's arrays in `content`; returns them by their own names, and sentences on what was left.

    The dictionary that holds the network's first array is taken, without what stands before the array's name. Entries
    of a loss or a metric, and entries that are no arrays, are left out.

    Args:
        content: what a checkpoint holds, nested as it is.
        source: name of the file, for messages.

    Raises:
        UserError: there are several networks, none of which is an average of another or the usual one.
    """
    found = [state for name in FIRST for state in _search(content, name)] or list(_search(content, LAST))
    if not found:
        return _without_others(next(_usual(content), StateDict((), "", content)), content)
    found.sort(key=lambda state: state.rank)
    if len(found) > 1 and found[0].rank == found[1].rank:
        names = ", ".join(repr(state.place) for state in found)
        raise UserError(f"{source} holds several networks ({names}): save the state dict of one in a file of its own")
    return _without_others(found[0], content)


def public_counts(values: Mapping[str, np.ndarray], names: Sequence[str]) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays `names`, numbers of batches, as PyTorch's strict loader takes them, and a sentence if it changes any.

    It takes 0 for one that is missing, cuts decimals off, and takes the element of an array of one.
    """
    result, missing, changed = {}, 0, 0
    for name in names:
        given = values.get(name)
        value = np.zeros((), np.int32) if given is None else given.reshape(()) if given.shape == (1,) else given
        if value.shape == () and value.dtype.kind == "f" and np.isfinite(value) and abs(value) < 2**31:
            value = value.astype(np.int32)
        missing += given is None
        changed += given is not None and value is not given
        result[name] = value
    notes = [f"set {missing} missing num_batches_tracked to 0"] if missing else []
    return result, notes + ([f"read {changed} num_batches_tracked as integers"] if changed else [])


def misfit(wanted: Set[str], given: Set[str]) -> str:
    """Why arrays of the names `given` are not those of a network with the names `wanted`; empty if they are."""
    missing, others = sorted(wanted - given), sorted(given - wanted)
    shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
    if not given:
        return "it holds no arrays"
    if len(missing) == len(wanted):
        return f"it is of another network, with arrays named {shown}"
    if missing and others:
        return f"it is of another network or a changed one: {len(missing)} arrays are missing, and there are {shown}"
    if missing:
        blocks = dict.fromkeys(name.split(".")[0] for name in missing)
        verb = "is" if len(missing) == 1 else "are"
        return f"{len(missing)} of its {len(wanted)} arrays {verb} missing, in {', '.join(blocks)}"
    return f"it is of a larger network, with {shown}" if others else ""


def shortened(problems: Sequence[str]) -> list[str]:
    """The first of many problems, and how many more there are."""
    more = len(problems) - MOST_LISTED
    return [*problems[:MOST_LISTED], f"and {more} more"] if more > 1 else list(problems)


def _is_array(value: Any) -> bool:
    return hasattr(value, "dtype") and hasattr(value, "shape")


def _search(content: Mapping[Any, Any], name: str, keys: tuple[str, ...] = ()) -> Iterator[StateDict]:
    for key, value in content.items():
        before = str(key).removesuffix(name)
        if str(key).endswith(name) and _is_array(value) and (not before or before.endswith(".")):
            yield StateDict(keys, before, content)
        elif isinstance(value, Mapping) and len(keys) < DEEPEST:
            yield from _search(value, name, (*keys, str(key)))


def _usual(content: Mapping[str, Any]) -> Iterator[StateDict]:
    return (StateDict((key,), "", content[key]) for key in WRAPPERS if isinstance(content.get(key), Mapping))


def _without_others(state: StateDict, whole: Mapping[Any, Any]) -> tuple[dict[str, Any], list[str]]:
    notes, arrays, left = [], {}, []
    for key, value in state.content.items():
        name = str(key).removeprefix(state.prefix)
        if str(key).startswith(state.prefix) and _is_array(value) and not NOT_NETWORK.match(name):
            arrays[name] = value
        else:
            left.append(str(key))
    if state.keys:
        others = sorted(str(key) for key in whole if key != state.keys[0])
        path = ".".join(state.keys)
        notes.append(f"took the weights under {path!r}" + (f", not {_some(others)}" if others else ""))
    if state.prefix:
        notes.append(f"removed the prefix {state.prefix!r} from every name")
    if left:
        notes.append(f"left out {_some(left)}")
    return arrays, notes


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
