"""The dependence of a learner's initial params on meta-parameters."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from equigrad.errors import ProblemError
from equigrad.problems import Params


@dataclass(frozen=True)
class Start:
    """Initial params φ_0 that may be computed from meta-parameters θ.

    Attributes:
        params: φ_0 as given, with its graph.
        meta_params: θ as given, at the ends of that graph.
        names: names of the meta-parameters that φ_0 depends on.

    Raises:
        ProblemError: the graph was freed.
    """

    params: Params
    meta_params: Params
    names: list[str] = field(init=False)

    def __post_init__(self) -> None:
        zeros = {n: torch.zeros_like(p) for n, p in self.params.items() if p.requires_grad}
        names = [name for name, grad in self._through(zeros).items() if grad is not None]
        object.__setattr__(self, "names", names)

    def pull_back(self, adjoint: Params) -> dict[str, Tensor]:
        """`(∂φ_0/∂θ)ᵀ adjoint`.

        Args:
            adjoint: derivative of the outer loss with respect to the start, by parameter name.

        Returns:
            The part of the meta-gradient through the start, by name; zero for other names.
        """
        pulled = self._through(adjoint)
        return {
            n: torch.zeros_like(m) if (g := pulled[n]) is None else g.detach()
            for n, m in self.meta_params.items()
        }

    def push(self, direction: Params) -> dict[str, Tensor]:
        """`(∂φ_0/∂θ) direction`, the change of the start when θ moves, by parameter name."""
        probe = {n: torch.zeros_like(p).requires_grad_() for n, p in self.params.items()}
        pulled = {n: g for n, g in self._through(probe).items() if g is not None}
        # the vector-Jacobian product is linear in the probe; its derivative is the push-forward
        moved = [(g, direction[n]) for n, g in pulled.items() if g.requires_grad]
        if not moved:
            return {n: torch.zeros_like(p) for n, p in self.params.items()}
        pushed = torch.autograd.grad(
            [g for g, _ in moved],
            list(probe.values()),
            [d for _, d in moved],
            allow_unused=True,
            materialize_grads=True,
        )
        return dict(zip(probe, pushed, strict=True))

    def _through(self, adjoint: Params) -> dict[str, Tensor | None]:
        """`(∂φ_0/∂θ)ᵀ adjoint` by name of the meta-parameter; None if there is no path."""
        outputs = [(p, adjoint[n]) for n, p in self.params.items() if p.requires_grad]
        inputs = {n: m for n, m in self.meta_params.items() if m.requires_grad}
        found: dict[str, Tensor | None] = dict.fromkeys(self.meta_params)
        if outputs and inputs:
            try:
                grads = torch.autograd.grad(
                    [p for p, _ in outputs],
                    list(inputs.values()),
                    [a for _, a in outputs],
                    retain_graph=True,
                    create_graph=any(a.requires_grad for _, a in outputs),
                    allow_unused=True,
                )
            except RuntimeError as error:
                raise ProblemError(
                    f"params are computed from meta_params, and the graph of that computation has "
                    f"already been freed ({str(error).splitlines()[0]}). Compute params anew for "
                    f"every call, or detach them"
                ) from error
            found.update(zip(inputs, grads, strict=True))
        return found
