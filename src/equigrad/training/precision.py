"""The precision of products of matrices and convolutions, for the length of a run."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch

Precision = Literal["float32", "tf32", "bf16"]


@contextmanager
def computing_in(precision: Precision, device: torch.device) -> Iterator[None]:
    """Multiply and convolve float32 tensors in a precision, and restore torch's settings after.

    Args:
        precision: `float32`: in full, also where torch itself would take TF32, as in convolutions.
            `tf32`: in TF32 on a CUDA device, with ten bits of mantissa; no other device knows it.
            `bf16`: in bfloat16, with seven, by torch's autocast. Parameters, statistics of batch
            normalisation, losses, and all that solvers and estimators compute stay in float32.
        device: of the tensors.

    Example:
        >>> with computing_in("bf16", torch.device("cpu")):
        ...     product = torch.ones(2, 2) @ torch.ones(2, 2)
        >>> product.dtype
        torch.bfloat16
    """
    libraries: tuple[Any, ...] = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [library.allow_tf32 for library in libraries]
    for library in libraries:
        library.allow_tf32 = precision == "tf32"
    try:
        with ExitStack() as stack:
            if precision == "bf16":
                stack.enter_context(torch.autocast(device.type, torch.bfloat16))
            yield
    finally:
        for library, allowed in zip(libraries, before, strict=True):
            library.allow_tf32 = allowed
