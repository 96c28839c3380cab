"""Checks of named tensors, and their conversion to complex numbers."""

from collections.abc import Mapping

from torch import Tensor

from equigrad.errors import ProblemError
from equigrad.parallel import whole
from equigrad.problems import Params
from equigrad.problems.refused import refuse_tensor
from equigrad.vectors import finite
from equigrad.wording import listed


def check_tensors(what: str, tensors: object) -> None:
    """Check that named tensors can settle or be learned.

    Args:
        what: what the tensors are, for the message.
        tensors: the user's value.

    Raises:
        ProblemError: it is not a mapping from names to finite floating-point tensors, or is empty.
    """
    if not isinstance(tensors, Mapping):
        raise ProblemError(
            f"{what} must be a dictionary from names to tensors, such as "
            f"dict(module.named_parameters()), got {type(tensors).__name__}"
        )
    if not tensors:
        raise ProblemError(f"{what} is empty; pass at least one tensor")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ProblemError(f"{what}[{name!r}] must be a tensor, got {type(tensor).__name__}")
        refuse_tensor(f"{what}[{name!r}]", tensor)
        if not finite(whole(tensor.detach())):
            raise ProblemError(f"{what}[{name!r}] holds NaN or infinite values")


def check_samples(params: Params) -> None:
    """Check that the first dimension of all params counts the same samples.

    Raises:
        ProblemError: it does not, or there are no samples.
    """
    counts = {name: len(p) if p.ndim else None for name, p in params.items()}
    if None in counts.values() or len({*counts.values()}) > 1:
        shapes = ", ".join(f"{name!r} {tuple(p.shape)}" for name, p in params.items())
        raise ProblemError(
            f"with samples=True the first dimension of all params is the number of samples, so it "
            f"must be the same for all; the shapes are {shapes}"
        )
    if 0 in counts.values():
        raise ProblemError(f"params {listed(params)} have 0 samples; leave out empty batches")


def like(beta: complex, tensors: Params) -> dict[str, Tensor]:
    """The tensors, made complex if β is complex."""
    if not isinstance(beta, complex):
        return dict(tensors)
    return {name: t.to(t.dtype.to_complex()) for name, t in tensors.items()}
