"""Checks that a problem's functions are holomorphic."""

import torch
from torch import Tensor

from equigrad.errors import ConfigurationError, EquigradError
from equigrad.evaluation import Evaluation, like
from equigrad.problems import Part, scalar
from equigrad.solvers import Settled

OTHER_SCHEMES = "scheme='symmetric' and scheme='forward' work with any activation and loss"


def require_holomorphic(evaluation: Evaluation, at: Settled) -> None:
    r"""Check that all functions of a problem are holomorphic at the end of a phase.

    A function f of complex numbers is holomorphic where `∂f/∂z̄ = 0`. Autograd's gradient for a seed
    v is `conj(∂f/∂z) v + ∂f/∂z̄ conj(v)`, so that the gradients for the seeds 1 and i distinguish
    the two derivatives.

    Raises:
        ConfigurationError: a function is not holomorphic, or does not accept complex numbers.
    """
    evaluation = evaluation.holding(at)
    evaluation.stage.stand_at(at)
    params = {name: p.clone().requires_grad_() for name, p in like(1j, at.params).items()}
    meta = {
        name: m.clone().requires_grad_() for name, m in like(1j, evaluation.meta_params).items()
    }
    for part in evaluation.parts(params, meta, at.end_step):
        _require(part)
        evaluation.tally.spend(2)


def _require(part: Part) -> None:
    try:
        value = part.value()
        if not value.requires_grad:
            return
        one, other = (
            torch.autograd.grad(
                value,
                part.leaves,
                scalar(seed, value) if value.is_complex() else None,
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            for seed in (1 + 0j, 1j)
        )
    except EquigradError:
        raise
    except (RuntimeError, TypeError) as error:
        said = str(error).splitlines()[0]
        remedy = (
            "if it combines params with real tensors, convert those by .to(dtype) of params or "
            "meta_params; if it uses an operation without complex numbers, it is not "
            "holomorphic: "
        )
        raise ConfigurationError(
            f"scheme='holomorphic' evaluates {part.name} with complex numbers, and it raised an "
            f"error ({said}): "
            f"{remedy if part.of_data else 'it is not holomorphic; '}{OTHER_SCHEMES}"
            + ("" if part.of_data else ", and torch.tanh and torch.sigmoid are holomorphic")
        ) from error
    if not value.is_complex() or not _turned(one, other):
        raise ConfigurationError(
            f"scheme='holomorphic' needs holomorphic functions, and {part.name} is not "
            f"holomorphic: it uses absolute values, conjugates or real parts of complex numbers; "
            f"{OTHER_SCHEMES}"
        )


def _turned(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    """Whether the gradients for the seed i are i times those for the seed 1."""
    apart = torch.stack([(b - 1j * a).norm() for a, b in zip(one, other, strict=True)]).norm()
    size = torch.stack([a.norm() for a in one]).norm()
    return bool(apart <= torch.finfo(size.dtype).eps ** 0.5 * size)
