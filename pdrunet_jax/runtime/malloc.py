"""Tune glibc malloc: reuse pages between steps and request huge pages."""

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

_ARENAS_PER_CORE = 4
"""Half of glibc's default. With a single arena, threads wait for each other in a heap fragmented by compilation: a step
takes 10 to 15 % longer than with cached programs, inference 25 %. More arenas keep more memory and gain no speed."""

_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")
_STRICT = "2"
"""In this mode the kernel counts reserved memory as used."""


def configure_malloc() -> bool:
    """Keep freed memory in this process for its next allocation. Returns whether that was possible.

    XLA on CPUs allocates the temporary memory of a program at each call, about 500 MiB for one training step at
    256x256. By default glibc takes such blocks from the kernel and returns them at once, and the kernel clears every
    page again at every step. Peak memory does not change, but memory freed after the peak is not available to other
    processes. Huge pages are requested where the kernel provides them on request (transparent_hugepage is "madvise", as
    on most Linux distributions). For the times of both see docs/performance.md.

    Call this before JAX is used: a thread that has allocated memory keeps its arena. Does nothing if the C library is
    not glibc, or if the environment already sets it (MALLOC_..., GLIBC_TUNABLES).
    """
    if (library := _glibc()) is None or not _may_tune():
        return False
    mallopt = library.mallopt
    arenas = _ARENAS_PER_CORE * cores()
    # Without mmap, large blocks come from the main thread's arena, where synchronous programs take their memory
    # (`compile.disable_async_dispatch`). Arenas of other threads hold 64 MiB; glibc still maps larger blocks each time.
    kept = all([mallopt(_ARENA_MAX, arenas), mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, -1)])
    if kept:
        _request_huge_pages(library)
    return kept


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def trim_malloc() -> None:
    """Return free memory to the system once. Compiling takes more memory than a small run needs.

    Does nothing if the C library is not glibc.
    """
    if library := _glibc():
        library.malloc_trim(0)
        if _may_tune():
            _request_huge_pages(library)


def _request_huge_pages(library: ctypes.CDLL) -> None:
    """Request huge pages for the heap and for the addresses that it will grow into.

    The request covers only addresses that already belong to the heap. A block of most of the machine's memory, freed at
    once, extends it; nobody writes to the block, so it takes no memory.
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
    """Whether reserving addresses costs nothing: no limit on them, no strict overcommit accounting."""
    import resource  # Windows has none

    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    if any(limit != resource.RLIM_INFINITY for limit in limits):
        return False
    try:
        return _OVERCOMMIT.read_text(encoding="ascii").strip() != _STRICT
    except OSError:
        return False


def _may_tune() -> bool:
    """Whether the environment leaves malloc's settings alone."""
    return "GLIBC_TUNABLES" not in os.environ and not any(name.startswith("MALLOC_") for name in os.environ)


@cache
def _glibc() -> ctypes.CDLL | None:
    """The C library of this process, or None if it is not glibc."""
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return None
    library = ctypes.CDLL(None)
    library.malloc.argtypes, library.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    library.free.argtypes = [ctypes.c_void_p]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return library
