"""What the C library does with memory that a process has freed.

A training step on the CPU allocates and frees the same activations again and again. glibc gives
such large blocks back to the kernel, which then clears their pages anew at every step: measured,
up to a quarter of a small network's step. A process that trains keeps them.
"""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_LARGEST = 2**31 - 1
_ADAPTED = 32 * 2**20  # the largest block that glibc adapts itself to keep; twice that is trimmed


def keep_freed_memory() -> None:
    """Reuse freed memory instead of giving it back; nothing where the C library is no glibc."""
    _set(_LARGEST, _LARGEST)


def give_back_freed_memory() -> None:
    """What glibc does by itself, at the largest thresholds that it adapts to."""
    _set(_ADAPTED, 2 * _ADAPTED)


def _set(mmap_threshold: int, trim_threshold: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, mmap_threshold)
        mallopt(_TRIM_THRESHOLD, trim_threshold)
