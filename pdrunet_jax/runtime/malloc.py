"""How the C library hands memory out: a step should get the pages of the last one, not new ones, and large ones."""

import ctypes
import mmap
import os
import platform
import sys
from functools import cache
from pathlib import Path

# Parameters of glibc's mallopt, from malloc.h, and the advice to madvise, from mman.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_HUGE_PAGES = 14

_ARENAS_A_CORE = 4
"""Half of what glibc would open. With one for all, threads wait for each other in a heap that compiling has left in
pieces: a step after it takes 10 to 15 % longer than with stored programs, inference a quarter. With more than these,
each keeps some memory of its own and nothing gets faster."""

_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")
_STRICT = "2"
"""The kernel then counts what is reserved as used."""


def configure_malloc() -> bool:
    """Let this process keep what it frees, for its next allocation; whether that could be arranged.

    XLA on CPUs allocates the temporary memory of a program at each call, some 500 MiB for one training step at 256x256,
    and glibc takes blocks of that size from the kernel and gives them straight back: the kernel then clears every page
    of every step anew, which costs a tenth to a third of the step's time. The peak stays what it is; what is freed
    after it is not given back to other processes.

    Where the kernel has huge pages on request (Linux's transparent_hugepage is "madvise", as on most distributions),
    they are requested: with small ones, looking addresses up costs 4 to 30 % of a step, the more the more other
    processes do.

    Call it before JAX is used: a thread that has allocated keeps the arena that it allocated from. Does nothing where
    the C library is not glibc, or where the environment already sets it (MALLOC_..., GLIBC_TUNABLES).
    """
    if (library := _glibc()) is None or not _ours():
        return False
    mallopt = library.mallopt
    arenas = _ARENAS_A_CORE * len(os.sched_getaffinity(0))
    # Without mappings, large blocks come from the main thread's arena, where programs that run in turn take their
    # memory (`compiling.dispatch_in_turn`). Other threads' arenas hold 64 MiB, and glibc maps what is larger anew.
    kept = all([mallopt(_ARENA_MAX, arenas), mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, -1)])
    if kept:
        _ask_for_huge_pages(library)
    return kept


def trim_malloc() -> None:
    """Return what is free to other processes, once: compiling takes, and leaves, more memory than a small run needs.

    Does nothing where the C library is not glibc.
    """
    if library := _glibc():
        library.malloc_trim(0)
        if _ours():
            _ask_for_huge_pages(library)


def _ask_for_huge_pages(library: ctypes.CDLL) -> None:
    """Ask for huge pages for the heap and the addresses after it, which it will grow into.

    The advice holds for addresses that are in the heap already; so it is made as large as memory for a moment, by a
    block that nobody writes to. Freed, the block stays a part of the heap, and takes no memory until it is used.
    """
    if not _may_reserve():
        return
    page = mmap.PAGESIZE
    size = os.sysconf("SC_PHYS_PAGES") * page // 4 * 3
    block = library.malloc(size)
    if block:
        start = -(-block // page) * page
        library.madvise(start, (block + size) // page * page - start, _HUGE_PAGES)
        library.free(block)


def _may_reserve() -> bool:
    """Whether addresses may be reserved without being missed elsewhere."""
    import resource  # Windows has none

    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    if any(limit != resource.RLIM_INFINITY for limit in limits):
        return False
    try:
        return _OVERCOMMIT.read_text(encoding="ascii").strip() != _STRICT
    except OSError:
        return False


def _ours() -> bool:
    """Whether the environment leaves the settings of the C library to us."""
    return "GLIBC_TUNABLES" not in os.environ and not any(name.startswith("MALLOC_") for name in os.environ)


@cache
def _glibc() -> ctypes.CDLL | None:
    """The C library of this process, if it is glibc."""
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return None
    library = ctypes.CDLL(None)
    library.malloc.argtypes, library.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    library.free.argtypes = [ctypes.c_void_p]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return library
