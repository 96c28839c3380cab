"""The contraction of a map near its fixed point, measured by a spectral radius."""

from dataclasses import replace

import torch
from torch import Tensor

from equigrad.errors import ConfigurationError, EquigradError, SettlingError
from equigrad.estimators.linearisation import Linearisation
from equigrad.evaluation import FOR_MAPS, Evaluation
from equigrad.fields import Count, expect
from equigrad.problems import Params, Problem
from equigrad.solvers import Anderson, Broyden, Settled, Solver
from equigrad.solvers.phase import numbered, resting
from equigrad.solvers.rows import at_least_single, move_rows, rows

VECTORS = 30
"""Number of products with the transposed matrix from which a radius is estimated."""


def spectral_radius(
    problem: Problem, params: Params, meta_params: Params, *, vectors: int = VECTORS, seed: int = 0
) -> Tensor:
    r"""The spectral radius of `∂F/∂φ`: the map contracts near a fixed point where it is below 1.

        max_i |λ_i(∂F/∂φ)|,    F = φ - r(φ, θ)

    by Arnoldi's iteration on products with the transposed matrix, so that no matrix is formed. It
    is exact if φ (of a sample) has at most `vectors` entries; otherwise it is an estimate, which
    may be too small or too large, and several times too large if the matrix is far from normal.
    Samples are assumed to settle independently; if a map mixes them (batch statistics in training
    mode), their interaction is not included.

    Args:
        problem: a `FixedPoint` or an `EnergyBased`.
        params: φ near the fixed point, usually the settled φ.
        meta_params: θ.
        vectors: number of products to take, at least 1.
        seed: seed of the initial vector.

    Returns:
        One number for each sample if the problem has samples, else a tensor without dimensions.

    Raises:
        ConfigurationError: the problem minimises a loss and has no map, or vectors is not a whole
            number of at least 1.

    Example:
        >>> import torch, equigrad as eg
        >>> problem = eg.FixedPoint(
        ...     map=lambda p, m: {"h": torch.stack([0.5 * p["h"][1], -0.5 * p["h"][0]]) + m["b"]},
        ...     outer_loss=lambda p, m: p["h"].sum(),
        ... )
        >>> round(spectral_radius(problem, {"h": torch.zeros(2)}, {"b": torch.ones(2)}).item(), 4)
        0.5
    """
    if problem.symmetric:
        raise ConfigurationError(
            f"a {type(problem).__name__} problem has no map, so it has no spectral radius; the "
            f"curvatures of its inner loss matter instead"
        )
    expect(Count, vectors=vectors)
    at = resting({name: p.detach() for name, p in params.items()})
    with Evaluation(problem, params, meta_params) as evaluation:
        return radius(evaluation, at, vectors, seed)


def radius(evaluation: Evaluation, at: Settled, vectors: int = VECTORS, seed: int = 0) -> Tensor:
    """The spectral radius at the end of a phase, as from `spectral_radius`."""
    samples = evaluation.problem.samples
    linear = Linearisation(evaluation, at, "spectral_radius")
    shaped = [torch.zeros_like(p) for p in at.params.values()]
    like = rows(shaped, samples)
    vectors = min(vectors, like.shape[1])
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)
    basis = like.new_zeros(vectors + 1, *like.shape)
    hessenberg = like.new_zeros(len(like), vectors + 1, vectors)
    basis[0] = drawn / drawn.norm(dim=1, keepdim=True)
    for k in range(vectors):
        tensors = [torch.zeros_like(t) for t in shaped]
        move_rows(tensors, basis[k])
        flat = torch.cat([t.reshape(-1) for t in tensors])
        pulled, images = flat - linear.product(flat), []
        for part, t in zip(pulled.split([t.numel() for t in tensors]), tensors, strict=True):
            images.append(part.view_as(t))
        image = rows(images, samples).clone()
        size = image.norm(dim=1)
        for _ in range(2):  # once more for what rounding left
            along = (basis[: k + 1] * image).sum(-1)
            image -= (along[:, :, None] * basis[: k + 1]).sum(0)
            hessenberg[:, : k + 1, k] += along.T
        left = image.norm(dim=1)
        left = torch.where(left > 10 * torch.finfo(left.dtype).eps * size, left, 0.0)
        hessenberg[:, k + 1, k] = left
        closed = (left == 0)[:, None]
        basis[k + 1] = torch.where(closed, 0.0, image / torch.where(closed, 1.0, left[:, None]))
    small = at_least_single(hessenberg[:, :vectors])
    found = torch.linalg.eigvals(small).abs().amax(dim=1).to(hessenberg.dtype)
    return found if samples else found[0]


def explained(error: SettlingError, evaluation: Evaluation, who: str = "") -> SettlingError:
    """The error of a map that diverged, with the spectral radius at its start as an explanation."""
    said = f"{who}: {error}" if who else f"{error}"
    start = resting(evaluation.params, evaluation.stage.snapshot())
    velocity, _ = evaluation.velocity()(_leaves(start.params), 0)
    if all(v.isfinite().all() for v in velocity):
        _, found = _contracts(evaluation, start)
        said += f". At the start, {found}"
    return SettlingError(said)


def verdict(evaluation: Evaluation, at: Settled, solver: Solver) -> str:
    """Whether the map contracts at the end of a phase that did not settle, with advice."""
    contracts, found = _contracts(evaluation, at)
    if at.phase.diverged:
        return f"with the diverged samples at their start, {found}. {FOR_MAPS}, or start elsewhere"
    if contracts is None:
        return found
    if contracts:
        others = "" if isinstance(solver, Anderson | Broyden) else ", or Anderson(),"
        return f"{found}: the map contracts nearby, and more steps{others} should settle it"
    other = "take more steps" if isinstance(solver, Broyden) else "use Broyden()"
    return f"{found}: the map does not contract. {FOR_MAPS}, or {other}"


def _contracts(evaluation: Evaluation, at: Settled) -> tuple[bool | None, str]:
    """Whether the map contracts at a state, None if that is unknown, and its spectral radius."""
    try:
        found = radius(evaluation, replace(at, lost=None))  # include the samples that are lost
    except (EquigradError, RuntimeError):  # no derivative, or not finite
        return None, "the spectral radius of ∂F/∂φ could not be computed there"
    worst = found.max().item()
    where = ""
    if found.ndim:
        above = torch.nonzero(~(found < 1)).flatten().tolist()
        where = f" in {numbered(above)} of {len(found)}" if above else f" in {len(found)} samples"
    size = rows(list(at.params.values()), evaluation.problem.samples).shape[1]
    about = "about " if size > VECTORS else ""
    sign = "<" if worst < 1 else "≥"
    return worst < 1, f"the spectral radius of ∂F/∂φ there is {about}{worst:.3g} {sign} 1{where}"


def _leaves(params: Params) -> dict[str, Tensor]:
    """The tensors as leaves that require a gradient."""
    return {name: p.clone().requires_grad_() for name, p in params.items()}
