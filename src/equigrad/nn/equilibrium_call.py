"""One forward pass of an equilibrium layer: the cell, its weights and inputs by name, its start."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from equigrad.equilibrium import LinearLoss
from equigrad.errors import ProblemError
from equigrad.problems import EnergyBased, FixedPoint, Params, Problem
from equigrad.randomness import CommonRandomness
from equigrad.solvers.phase import numbered
from equigrad.vectors import tracked

State = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""The state h that settles: a tensor, a tuple or list of tensors, or a dictionary of them."""


def kind_of(cell: nn.Module) -> type[Problem]:
    """The problem class of a cell: `EnergyBased` if it has a `primitive`, else `FixedPoint`."""
    return EnergyBased if hasattr(cell, "primitive") else FixedPoint


class Call:
    """One forward pass: a cell, its weights and inputs by name, and its initial state.

    Attributes:
        method: the method of the cell that is called, wrapped as a module.
        tensors: weights and inputs, by name.
        start: initial state h, by name.
        seed: seed of the random numbers.
    """

    def __init__(self, cell: nn.Module, inputs: tuple[Any, ...], start: State) -> None:
        self.cell = cell
        self.method = _Method(cell, "primitive" if kind_of(cell) is EnergyBased else "forward")
        leaves, self._tree = tree_flatten(inputs)
        # no weight can have a name with two dots, since no module's name is empty
        self._slots = [f"input..{i}" if isinstance(x, Tensor) else x for i, x in enumerate(leaves)]
        given = {f"input..{i}": tracked(x) for i, x in enumerate(leaves) if isinstance(x, Tensor)}
        self._weights = dict(cell.named_parameters())
        self.tensors: dict[str, Tensor] = {**self._weights, **given}
        self.start = {name: tracked(part).detach() for name, part in _named(start).items()}
        self._form = type(start)
        self.seed: int | None = None
        self._buffers = {n: b.detach().clone() for n, b in cell.named_buffers()}
        device = next(iter(self.start.values())).device.type
        self._autocast = device, torch.get_autocast_dtype(device)
        self._lower = torch.is_autocast_enabled(device)

        for name, x in given.items():
            _check_finite(f"{name.replace('..', ' ')} of {type(cell).__name__}", x)
        for name, part in self.start.items():
            _check_finite(f"the start of {name!r} of {type(cell).__name__}", part)

    def full_precision(self) -> AbstractContextManager[Any]:
        """A context without autocast for solvers and estimators; the cell alone restores it."""
        device, _ = self._autocast
        if not torch.is_autocast_enabled(device):
            return nullcontext()
        return torch.autocast(device, enabled=False)

    def problem(self, tensors: Params, learned: Params, cotangent: Params | None = None) -> Problem:
        """The cell as a problem with θ = `learned` and the outer loss `⟨cotangent, h⟩`."""
        known: Any = {
            "outer_loss": LinearLoss(cotangent or {}),
            "modules": (),  # buffers are swapped, not changed
            "reaches": {"inner": list(learned), "outer": []},
            "samples": True,
        }
        if kind_of(self.cell) is EnergyBased:
            return EnergyBased(
                lambda params, meta: self._evaluate(params, {**tensors, **meta}),
                activation=self.cell.activation,  # pyright: ignore
                **known,
            )
        return FixedPoint(lambda params, meta: self._image(params, {**tensors, **meta}), **known)

    @torch.no_grad()
    def move_buffers(self, params: Params) -> None:
        """Evaluate the cell once and let it update its buffers."""
        if self._buffers:
            with CommonRandomness(params.values(), self.seed) as randomness, self._precision():
                randomness.seed("inner", 0)
                self.method.forward(*self._arguments(params, self.tensors))

    def shaped(self, params: Params) -> Any:
        """The state in the form that the cell takes: a tensor, a tuple or a dictionary."""
        if issubclass(self._form, Tensor):
            return params["h"]
        return dict(params) if issubclass(self._form, Mapping) else tuple(params.values())

    def _image(self, params: Params, tensors: Params) -> dict[str, Tensor]:
        """`f(h, x)` by name, with an error where the cell returns a state of another shape."""
        image = self._evaluate(params, tensors)
        named = {"h": image} if isinstance(image, Tensor) else _named(image)
        shapes, found = _shapes(params), _shapes(named)
        if shapes != found:
            raise ProblemError(
                f"{type(self.cell).__name__} must return h with the shapes of its start, "
                f"{shapes}, but returned {found}. Change the start or the cell"
            )
        return named

    def _evaluate(self, params: Params, tensors: Params) -> Any:
        """Evaluate the cell at h, with these weights and inputs."""
        arguments = self._arguments(params, tensors)
        swapped = {
            f"module.{name}": tensors[name]
            for name, weight in self._weights.items()
            if not _same(tensors[name], weight)
        }
        if self.cell.training:  # every step sees the same buffers, so that the map does not change
            swapped |= {f"module.{name}": b.clone() for name, b in self._buffers.items()}
        with self._precision():
            if swapped:
                return functional_call(self.method, swapped, arguments)
            return self.method.forward(*arguments)

    def _arguments(self, params: Params, tensors: Params) -> tuple[Any, ...]:
        """The arguments of the cell: the state and the inputs."""
        leaves = [tensors[s] if isinstance(s, str) and s in tensors else s for s in self._slots]
        return self.shaped(params), *tree_unflatten(leaves, self._tree)

    def _precision(self) -> AbstractContextManager[Any]:
        """A context that restores the forward pass's autocast for the cell."""
        if not self._lower:
            return nullcontext()
        device, dtype = self._autocast
        # the solver updates h, a leaf, in place, and autocast's cache would keep its old value
        return torch.autocast(device, dtype, cache_enabled=False)


def _named(h: State) -> dict[str, Tensor]:
    """The tensors of h by name; raises if h has the wrong type or sample counts differ."""
    if isinstance(h, Tensor):
        named = {"h": h}
    elif isinstance(h, Mapping):
        named = dict(h)
    else:
        named = {f"h{i}": part for i, part in enumerate(h)} if isinstance(h, Sequence) else {}
    parts = list(named.values())
    if not parts or not all(isinstance(p, Tensor) and p.ndim for p in parts):
        raise ProblemError(
            f"h must be a tensor whose first dimension counts samples, or a tuple or dictionary "
            f"of such tensors, got {type(h).__name__}"
            + (f" of {', '.join(type(p).__name__ for p in parts)}" if parts else "")
        )
    if len({len(p) for p in parts}) > 1:
        raise ProblemError(
            f"all tensors of h must have the same number of samples, got {_shapes(named)}"
        )
    return named


def _shapes(named: Params) -> dict[str, tuple[int, ...]]:
    return {name: tuple(part.shape) for name, part in named.items()}


def _same(tensor: Tensor, weight: Tensor) -> bool:
    """Whether a tensor is the module's own weight, which then need not be swapped."""
    if tensor is weight:
        return True
    return not tensor.requires_grad and tensor.data_ptr() == weight.data_ptr()


def _check_finite(what: str, x: Tensor) -> None:
    finite = torch.isfinite(x.detach())
    if not finite.all():
        bad = torch.nonzero(~finite.reshape(len(x), -1).all(1)).flatten() if x.ndim else []
        where = f" in {numbered([int(i) for i in bad])} of {len(x)}" if x.ndim else ""
        raise ProblemError(f"{what} holds NaN or infinite values{where}; check the data")


class _Method(nn.Module):
    """A module whose forward pass is a given method of another module."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module, self._name = module, method

    def forward(self, *inputs: Any) -> Any:
        called = self.module if self._name == "forward" else getattr(self.module, self._name)
        return called(*inputs)
