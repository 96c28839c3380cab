"""Keeps memory that tensors have freed, for later tensors."""

import ctypes

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # numbers of mallopt(3)
_NEVER = -1


def keep_freed_memory() -> bool:
    """Make the process keep the CPU memory of freed tensors for later tensors.

    glibc returns blocks above 32 MB, and free memory at the end of its heap, to the operating
    system, and gets new memory page by page, each filled with zeros. A loop that repeatedly makes
    large tensors can spend a fifth of its time on this. After this call glibc keeps the memory, so
    that a process holds the most that it ever needed. The setting applies to the whole process, so
    that only the command line makes it by itself. It does not affect tensors on other devices.

    Returns:
        Whether the C library accepted the settings; False if it is not glibc.

    Example:
        >>> kept = keep_freed_memory()
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    kept = bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))
    # While glibc's cache of tiny blocks is not full, it keeps the slivers that align a tensor. They
    # split the free memory, so that the next large tensor fits nowhere; there are seven for each.
    _ = [torch.empty(1000) for _ in range(16)]
    return kept
