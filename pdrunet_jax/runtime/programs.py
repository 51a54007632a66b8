"""Programs of JAX on one CPU that start without tracing: traced once and stored. The same program, hence the same bits.

The machine code is in JAX's own cache (`compile.enable_compilation_cache`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import export

from pdrunet_jax.runtime import compile as compiling
from pdrunet_jax.runtime.devices import start_devices
from pdrunet_jax.runtime.store import discard_entry, read_entry, write_entry

KIND = "program"
Program = Callable[..., Any]


def is_possible() -> bool:
    """Start JAX's devices. Whether it computes on one CPU, the device that programs are stored for."""
    devices = start_devices()
    return jax.device_count() == 1 and devices[0].platform == "cpu"


def load_program(key: str, donate: Sequence[int] = ()) -> Program | None:
    """The compiled program that is stored under `key` (`store.program_key`); None if there is none.

    Custom calls in it have to be registered. `donate` numbers arguments whose memory the program takes over.
    """
    if not (stored := read_entry(KIND, key)):
        return None
    try:
        return _compile(export.deserialize(bytearray(stored)), donate)
    except Exception as error:  # of whatever kind: it is made again
        discard_entry(KIND, key, next(iter(str(error).splitlines()), type(error).__name__))
        return None


def make_program(
    key: str,
    function: Callable[..., Any],
    arguments: Sequence[Any],
    donate: Sequence[int] = (),
    custom_calls: Sequence[str] = (),
) -> Program:
    """Trace `function` for arrays like `arguments`, store it under `key`, and compile it.

    Arguments and results are arrays in lists, tuples and dictionaries. `custom_calls` names those that it may contain.
    """
    checks = [export.DisabledSafetyCheck.custom_call(name) for name in custom_calls]
    traced: Any = compiling.jit(function)
    exported = export.export(traced, disabled_checks=checks)(*arguments)
    write_entry(KIND, key, bytes(exported.serialize()))
    return _compile(exported, donate)


def _compile(exported: export.Exported, donate: Sequence[int]) -> Program:
    forms = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in exported.in_avals]
    arguments, _ = jax.tree.unflatten(exported.in_tree, forms)
    jitted: Any = compiling.jit(exported.call, donate_argnums=tuple(donate))
    compiled: Program = jitted.lower(*arguments).compile()
    return compiled
