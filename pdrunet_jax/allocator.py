"""How the C library hands memory out: a step should get the pages of the last one, not new ones."""

import ctypes
import os
import platform
import sys
from functools import cache

# Parameters of glibc's mallopt, from malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, for its next allocation; whether that could be arranged.

    XLA on CPUs allocates the temporary memory of a program at each call, some 500 MiB for one training step at 256x256,
    and glibc takes blocks of that size from the kernel and gives them straight back: the kernel then clears every page
    of every step anew, which costs a tenth to a third of the step's time. The peak stays what it is; what is freed
    after it is not given back to other processes.

    Call it before JAX is used: a thread that has allocated keeps the arena that it allocated from. Does nothing where
    the C library is not glibc, or where the environment already sets it (MALLOC_..., GLIBC_TUNABLES).
    """
    if (library := _glibc()) is None:
        return False
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    # One arena, because the others, of XLA's threads, cannot hold blocks of that size and would map them anew.
    mallopt = library.mallopt
    return all([mallopt(_ARENA_MAX, 1), mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, -1)])


def give_back() -> None:
    """Return what is free to other processes, once: compiling takes, and leaves, more memory than a small run needs.

    Does nothing where the C library is not glibc.
    """
    if library := _glibc():
        library.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    """The C library of this process, if it is glibc."""
    return ctypes.CDLL(None) if sys.platform == "linux" and platform.libc_ver()[0] == "glibc" else None
