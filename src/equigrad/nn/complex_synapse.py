"""The complex synapse: a weight that is pulled to a centre with a strength of its own."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from equigrad.errors import ConfigurationError, ProblemError
from equigrad.fields import expect
from equigrad.nn.functional import Functional
from equigrad.problems import Params

Learnable = Literal["strength", "center"]


class ComplexSynapse(Functional):
    r"""Any module with every weight pulled to a centre, each with a strength of its own.

        R(φ, θ) = ½ Σ_i λ_i (φ_i - ω_i)²        (Zucchet et al., Eq. 7)

    A synapse has a fast weight φ (`params`), and as meta-parameters θ a meta-plasticity λ
    (`strength`) and a slow weight ω (`center`), either of which can be learned or fixed. Used as
    `regularizer=` of a problem, its derivatives are local and in closed form (Appendix B), and the
    contrast of two phases is free of cancellation:

        ½(a-ω)² - ½(b-ω)² = ½ (a-b)(a+b-2ω).

    Fast weights may have more leading dimensions than the module's weights (one for tasks, for
    example). Each copy is pulled to the same centre with the same strength; the penalty is the sum.

    Args:
        model: any module; called as `synapse(params, *inputs)`. It is copied, never changed.
        strength: initial λ ≥ 0: one number for all weights, or a number or tensor for every name. A
            tensor has the weight's shape, with ones along dimensions that share a strength.
        center: initial ω, given likewise; or "init" for the module's own parameters.
        learn: what is meta-learned: `strength`, `center` or both.
        positivity: how a learned λ is kept ≥ 0. `projection`: λ itself is the meta-parameter,
            and `project_` clamps it at zero after each outer step. `log`: log λ is.

    Raises:
        ConfigurationError: a negative strength, nothing to learn, or an unknown option.
        ProblemError: strength or center given by name do not fit the module's names and shapes.

    Example:
        >>> import torch
        >>> synapse = ComplexSynapse(torch.nn.Linear(3, 1, bias=False), strength=0.1)
        >>> meta_params = synapse.meta_params()
        >>> sorted(meta_params)
        ['strength.weight']
        >>> synapse({"weight": torch.ones(1, 3)}, torch.ones(2, 3)).flatten()
        tensor([3., 3.])
        >>> round(synapse.penalty({"weight": torch.ones(1, 3)}, meta_params).item(), 3)
        0.15
    """

    def __init__(
        self,
        model: nn.Module,
        strength: float | Mapping[str, float | Tensor] = 1e-3,
        center: float | Mapping[str, float | Tensor] | Literal["init"] = 0.0,
        *,
        learn: Sequence[Learnable] = ("strength",),
        positivity: Literal["projection", "log"] = "projection",
    ) -> None:
        super().__init__(model)
        if not learn or set(learn) - {"strength", "center"}:
            raise ConfigurationError(
                f"learn must contain 'strength', 'center' or both, got {tuple(learn)}"
            )
        expect(Literal["projection", "log"], positivity=positivity)
        if isinstance(center, str) and center != "init":
            raise ConfigurationError(
                f"center must be a number, a dictionary of tensors, or 'init', got {center!r}"
            )
        self.learn = tuple(learn)
        self.positivity = positivity
        self._log = positivity == "log" and "strength" in self.learn
        self._strength = self._spread("strength", strength)
        self._center = self._spread("center", self._initial if center == "init" else center)
        for name, s in self._strength.items():
            allowed = s > 0 if self._log else s >= 0
            bad = s[~(allowed & s.isfinite())]
            if bad.numel():
                raise ConfigurationError(
                    f"strength must be {'positive for log λ' if self._log else 'at least 0'} and "
                    f"finite, got {bad[0].item()} for {name!r}"
                )
        if not all(c.isfinite().all() for c in self._center.values()):
            raise ConfigurationError("center must be finite")
        self._centered = "center" in self.learn or any(c.any() for c in self._center.values())

    def meta_params(self) -> dict[str, Tensor]:
        """New leaves: `strength.NAME` or `log_strength.NAME`, and `center.NAME`, if learned.

        Each has the shape of the weight `NAME`, or that of its shared strengths, and requires a
        gradient.
        """
        leaves: dict[str, Tensor] = {}
        if "strength" in self.learn:
            for name, s in self._strength.items():
                leaves[self._strength_name(name)] = s.log() if self._log else s.clone()
        if "center" in self.learn:
            leaves |= {f"center.{name}": c.clone() for name, c in self._center.items()}
        return {name: leaf.requires_grad_() for name, leaf in leaves.items()}

    def start(self, meta_params: Params) -> dict[str, Tensor]:
        """Initial fast weights of a new task: the centres."""
        return dict(self.centers(meta_params))

    def weights(self, params: Params, meta_params: Params) -> Params:
        """The module's weights; all of them are fast."""
        return params

    @property
    def regularizer(self) -> "ComplexSynapse":
        """The synapse itself."""
        return self

    @property
    def meta_names(self) -> frozenset[str]:
        """Names of the meta-parameters."""
        names = set()
        if "strength" in self.learn:
            names |= {self._strength_name(name) for name in self._initial}
        if "center" in self.learn:
            names |= {f"center.{name}" for name in self._initial}
        return frozenset(names)

    def strengths(self, meta_params: Params) -> dict[str, Tensor]:
        """The strengths λ, by name of the weight that each acts on."""
        if "strength" not in self.learn:
            return self._strength
        found = {name: self._find(meta_params, self._strength_name(name)) for name in self._initial}
        return {name: s.exp() for name, s in found.items()} if self._log else found

    def centers(self, meta_params: Params) -> dict[str, Tensor]:
        """The centres ω, by name of the weight that each pulls."""
        if "center" not in self.learn:
            return self._center
        return {name: self._find(meta_params, f"center.{name}") for name in self._initial}

    def penalty(self, params: Params, meta_params: Params) -> Tensor:
        """The penalty `½ Σ_i λ_i (φ_i - ω_i)²`, differentiable in λ, ω and φ."""
        strength, center = self.strengths(meta_params), self.centers(meta_params)
        moved = {n: params[n] - c for n, c in center.items()} if self._centered else params
        terms = [(strength[n] * moved[n].square()).sum() for n in self._initial]
        return 0.5 * torch.stack(terms).sum()

    def bind(self, meta_params: Params) -> "BoundSynapse":
        """The regulariser at fixed meta-parameters, as a problem's `regularizer` provides it."""
        return BoundSynapse(self, meta_params)

    @torch.no_grad()
    def project_(self, meta_params: Params) -> None:
        """Clamp a learned λ at zero, in place. A learned log λ needs no clamping."""
        if "strength" in self.learn and not self._log:
            for name in self._initial:
                meta_params[self._strength_name(name)].clamp_(min=0)

    def _strength_name(self, name: str) -> str:
        return f"log_strength.{name}" if self._log else f"strength.{name}"

    def _find(self, meta_params: Params, name: str) -> Tensor:
        try:
            return meta_params[name]
        except KeyError:
            raise ProblemError(
                f"meta_params has no {name!r}; start from synapse.meta_params()"
            ) from None

    def _spread(self, what: str, value: float | Mapping[str, float | Tensor]) -> dict[str, Tensor]:
        """Expand the values to one tensor a weight: its shape, or ones where weights share them."""
        if not isinstance(value, Mapping):
            return {name: torch.full_like(p, value) for name, p in self._initial.items()}
        if value.keys() != self._initial.keys():
            raise ProblemError(
                f"{what} has entries for {sorted(value)}, but the module's weights are "
                f"{sorted(self._initial)}"
            )
        spread = {}
        for name, p in self._initial.items():
            tensor = torch.as_tensor(value[name], dtype=p.dtype, device=p.device).detach()
            shapes = {p.shape}
            if what == "strength" and tensor.ndim == p.ndim:
                sizes = zip(tensor.shape, p.shape, strict=True)
                shapes.add(torch.Size([1 if own == 1 else size for own, size in sizes]))
            if tensor.ndim and tensor.shape not in shapes:
                raise ProblemError(
                    f"{what}[{name!r}] has shape {tuple(tensor.shape)}, but the weight has shape "
                    f"{tuple(p.shape)}"
                )
            spread[name] = (tensor if tensor.ndim else tensor.expand(p.shape)).clone()
        return spread


class BoundSynapse:
    """A complex synapse at fixed meta-parameters, with its local rules in closed form."""

    def __init__(self, synapse: ComplexSynapse, meta_params: Params) -> None:
        self._synapse = synapse
        self._names = list(synapse.params())
        self._strength = [s.detach() for s in synapse.strengths(meta_params).values()]
        self._center = [c.detach() for c in synapse.centers(meta_params).values()]

    def add_velocity(self, velocity: tuple[Tensor, ...], params: Params) -> tuple[Tensor, ...]:
        """Add the pull `-λ (φ - ω)` to a velocity. Called without recording a graph."""
        if list(params) != self._names:  # φ holds more, or in another order
            by_name = dict(zip(params, velocity, strict=True))
            own = {name: params[name] for name in self._names}
            pulled = self.add_velocity(tuple(by_name[name] for name in own), own)
            by_name.update(zip(own, pulled, strict=True))
            return tuple(by_name.values())
        weights = list(params.values())
        if self._synapse._centered:
            weights = torch._foreach_sub(weights, self._center)
        return tuple(torch._foreach_addcmul(velocity, weights, self._strength, value=-1))

    @torch.no_grad()
    def contrast(self, states: Sequence[Params], weights: Sequence[complex]) -> dict[str, Tensor]:
        """`Σ_i w_i ∂R/∂θ(φ_i)` for weights that sum to zero (Appendix B), without cancellation.

        With the first state as reference b: `∂R/∂λ` contributes `½ w_i (φ_i-b)(φ_i+b-2ω)`, times
        λ where log λ is learned; `∂R/∂ω` contributes `-λ w_i (φ_i-b)`.
        """
        grads: dict[str, Tensor] = {}
        for name, strength, center in zip(self._names, self._strength, self._center, strict=True):
            reference = states[0][name]
            by_strength, by_center = torch.zeros_like(reference), torch.zeros_like(reference)
            for state, weight in zip(states[1:], weights[1:], strict=True):
                moved = state[name] - reference
                by_strength += 0.5 * weight * moved * (moved + 2 * (reference - center))
                by_center -= weight * strength * moved
            by_strength = by_strength.sum_to_size(strength.shape)
            by_center = by_center.sum_to_size(center.shape)
            if "strength" in self._synapse.learn:
                grads[self._synapse._strength_name(name)] = (
                    strength * by_strength if self._synapse._log else by_strength
                )
            if "center" in self._synapse.learn:
                grads[f"center.{name}"] = by_center
        return grads
