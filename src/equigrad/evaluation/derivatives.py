"""The losses and their derivatives at the end of a phase."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from equigrad.evaluation.scene import Scene
from equigrad.evaluation.tensors import like
from equigrad.problems import Params, slope
from equigrad.randomness import Stream
from equigrad.solvers import Settled


@torch.no_grad()
def outer_loss(scene: Scene, at: Settled) -> Tensor:
    """The outer loss at the end of a phase, averaged over its batches."""
    if at is scene.judged.at and scene.judged.loss is not None:
        return scene.judged.loss
    scene = scene.holding(at)
    scene.stage.stand_at(at)
    steps = scene.batch_steps("outer")
    total = sum(scene.evaluate("outer", at.params, scene.meta_params, step) for step in steps)
    return torch.as_tensor(total) / len(steps)


def outer_gradients(scene: Scene, at: Settled) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`∂L_out/∂φ` and `∂L_out/∂θ` at the end of a phase, averaged over batches."""
    scene = scene.holding(at)
    scene.stage.stand_at(at)
    names = scene.reaches.functions["outer"]
    params = {name: p.detach().requires_grad_() for name, p in at.params.items()}
    reached = {name: scene.meta_params[name].detach().requires_grad_() for name in names}
    meta = {**scene.meta_params, **reached}
    leaves = [*params.values(), *reached.values()]
    total = [torch.zeros_like(leaf, requires_grad=False) for leaf in leaves]
    steps = scene.batch_steps("outer")
    mean = torch.zeros(())
    for step in steps:
        loss = scene.evaluate("outer", params, meta, step)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        torch._foreach_add_(total, grads, alpha=1 / len(steps))
        mean = mean + loss.detach() / len(steps)
        scene.tally.spend(1)
    direct = {name: torch.zeros_like(m) for name, m in scene.meta_params.items()}
    direct.update(zip(names, total[len(params) :], strict=True))
    pressure = dict(zip(params, total, strict=False))
    if at.phase.beta == 0 or scene.judged.at is None:  # the loss is needed at free ends only
        scene.judged.at, scene.judged.loss = at, mean
        scene.judged.pressure = dict(pressure), dict(direct)  # estimators may add to theirs
    return pressure, direct


def meta_partial(scene: Scene, stream: Stream, at: Settled) -> dict[str, Tensor]:
    """`∂L/∂θ` of the inner or outer data loss at the end of a phase, averaged over its batches.

    The result holds only the meta-parameters that the loss depends on. If there are none, the loss
    is not evaluated.
    """
    names = scene.reaches.functions[stream]
    if not names:
        return {}
    scene = scene.holding(at)
    scene.stage.stand_at(at)
    meta = {
        name: m.clone().requires_grad_() if name in names else m
        for name, m in like(at.phase.beta, scene.meta_params).items()
    }
    leaves = [meta[name] for name in names]
    total = [torch.zeros_like(leaf, requires_grad=False) for leaf in leaves]
    steps = scene.batch_steps(stream)
    for step in steps:
        loss = scene.evaluate(stream, at.params, meta, step)
        if not loss.requires_grad:  # this batch depends on no meta-parameter
            continue
        torch._foreach_add_(total, slope(loss, leaves), alpha=1 / len(steps))
        scene.tally.spend(1)
    return dict(zip(names, total, strict=True))


def contrast(
    scene: Scene,
    states: Sequence[Settled],
    weights: Sequence[complex],
    direct: Params | None = None,
) -> dict[str, Tensor]:
    """The real part of `Σ_i w_i ∂L/∂θ(φ_i, θ, β_i)`, for weights that sum to zero.

    To avoid cancellation, differences to the first state are formed before they are weighted, and
    the regulariser contributes in factored form.

    Args:
        scene: the problem at its θ.
        states: the ends of the phases.
        weights: w_i.
        direct: `∂L_out/∂θ`, which replaces the contribution of the outer loss if a constant force
            nudged the phases.
    """
    total = {name: torch.zeros_like(m) for name, m in scene.meta_params.items()}
    for name, grad, weight in _terms(scene, states, weights, nudged_by_loss=direct is None):
        _add(total[name], grad, weight)
    for name, grad in (direct or {}).items():
        total[name].add_(grad)
    if scene.problem.regularizer is not None:
        pull = scene.problem.regularizer.bind(scene.meta_params)
        part = pull.contrast([state.params for state in states], weights)
        for name, grad in part.items():
            total[name].add_(grad.real)
    return total


def _terms(
    scene: Scene, states: Sequence[Settled], weights: Sequence[complex], nudged_by_loss: bool
) -> Iterator[tuple[str, Tensor, complex]]:
    """The terms of a contrast of the data losses: a name, its derivative, and its weight."""
    reference = _inner_partial(scene, states[0])
    for state, weight in zip(states, weights, strict=True):
        if reference and state is not states[0]:
            for name, grad in _inner_partial(scene, state).items():
                yield name, grad - reference[name], weight
        if state.phase.beta != 0 and nudged_by_loss:
            for name, grad in meta_partial(scene, "outer", state).items():
                yield name, grad, weight * state.phase.beta


def _inner_partial(scene: Scene, at: Settled) -> dict[str, Tensor]:
    """`∂L_in/∂θ` at the end of a phase, kept for the next contrast with the same state."""
    known = scene.judged.partials
    for state, partial in known:
        if state is at:
            return partial
    partial = meta_partial(scene, "inner", at)
    known[:] = [*known[-1:], (at, partial)]
    return partial


def _add(total: Tensor, grad: Tensor, weight: complex) -> None:
    """Add the real part of `weight grad`."""
    if isinstance(weight, complex):
        total.add_((weight * grad).real)
    else:
        total.add_(grad, alpha=weight)
