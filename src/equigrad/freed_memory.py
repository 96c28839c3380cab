"""Memory that tensors freed, kept for the tensors to come."""

import ctypes

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # numbers of mallopt(3)
_NEVER = -1


def keep_freed_memory() -> bool:
    """Let the process keep the memory of freed tensors on the CPU for the tensors that follow.

    glibc hands blocks above 32 MB, and whatever is free at the end of its heap, back to the
    operating system, and gets new ones page by page, each page filled with zeros: a loop that makes
    large tensors again and again can spend a fifth of its time on that. After this call it keeps
    them, so that a process holds the most that it ever needed. It is for the whole process, which
    is why only the command line does it unasked. Tensors on other devices are not concerned.

    Returns:
        Whether the C library took the settings; False where it is not glibc.

    Example:
        >>> kept = keep_freed_memory()
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    kept = bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))
    # Until glibc's cache of tiny blocks is full, it takes the slivers that align a tensor. They
    # then lie between what is free, and the next large tensor fits nowhere: seven times over.
    _ = [torch.empty(1000) for _ in range(16)]
    return kept
