"""A module as a function of its parameters."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from equigrad.errors import ProblemError
from equigrad.nn.copies import copied, held_parameters, tensors_in
from equigrad.problems import Params
from equigrad.problems.refused import refuse_module
from equigrad.wording import listed


class Functional:
    """A copy of a module that is called with its parameters as an argument.

    It does the work of `torch.func.functional_call` at a fraction of the cost of a call: since the
    copy is private, its parameters need not be restored. The user's module is never touched.

    A parameter that the module also holds in a list, a tuple or a dictionary is replaced there,
    too. With gradient checkpointing, which computes again in the backward pass, the parameters are
    those of the forward pass in question.

    Args:
        model: any module. Parameters with `requires_grad=False` stay constants.

    Attributes:
        model: the private copy; its buffers and training flag are its own.

    Warns:
        UserWarning: parameters have backward hooks, which the copy does not have.

    Raises:
        ProblemError: the module has no trainable parameters, or is shared by several processes; or,
            in a call, the names or shapes of the parameters are not those of the module.

    Example:
        >>> import torch
        >>> net = Functional(torch.nn.Linear(3, 2))
        >>> params = net.params()
        >>> sorted(params), net(params, torch.ones(5, 3)).shape
        (['bias', 'weight'], torch.Size([5, 2]))
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise ProblemError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        refuse_module(model)
        if hooked := [name for name, p in model.named_parameters() if p._backward_hooks]:
            warnings.warn(
                f"parameters {listed(hooked)} of {type(model).__name__} have backward hooks "
                f"(register_hook), which the copy does not have. Change the loss instead, for "
                f"example by a mask on what is to stay as it is",
                stacklevel=2,
            )
        self.model = copied(model)
        self._initial = {
            name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad
        }
        if not self._initial:
            raise ProblemError(f"{type(model).__name__} has no parameters that require a gradient")
        first_name: dict[int, str] = {}
        self._places: list[tuple[str, Any, Any]] = []
        for name, p in self.model.named_parameters(remove_duplicate=False):
            if not p.requires_grad:
                continue
            owner, _, local = name.rpartition(".")
            shared = first_name.setdefault(id(p), name)  # tied weights are one parameter
            self._places.append((shared, self.model.get_submodule(owner)._parameters, local))
        again = [
            (first_name[id(p)], owner, key)
            for owner, key, p in held_parameters(self.model)
            if id(p) in first_name
        ]
        self._places += again
        self._holds = bool(again)  # plain attributes may hold older tensors
        self._recomputes = any(map(_checkpoints, self.model.modules()))
        self._bound: tuple[Tensor, ...] = ()

    def params(self) -> dict[str, Tensor]:
        """The module's original parameters, in new tensors."""
        return {name: p.clone() for name, p in self._initial.items()}

    def module(self, weights: Params | None = None) -> nn.Module:
        """An ordinary module with these weights, or the original ones, in new parameters."""
        weights = self._initial if weights is None else weights
        parameters = {name: nn.Parameter(weights[name].detach().clone()) for name in self._initial}
        self._bind(parameters)
        module = copied(self.model)
        self._bind(self._initial)
        return module

    def __call__(self, params: Params, *args: Any, **kwargs: Any) -> Any:
        """The module's output with these parameters; names that it does not have are ignored."""
        self._bind(params)
        out = self.model(*args, **kwargs)
        if self._recomputes and not torch.compiler.is_compiling():
            # restore these weights before the backward pass recomputes the module's activations
            for tensor in tensors_in(out):
                if tensor.requires_grad and tensor.grad_fn is not None:
                    tensor.register_hook(lambda grad: self._bind(params))
        return out

    def _bind(self, params: Params) -> None:
        """Put the parameters into the module, unless they are there already."""
        try:
            tensors = tuple([params[name] for name in self._initial])
        except KeyError:
            missing = [name for name in self._initial if name not in params]
            raise ProblemError(
                f"params has no {', '.join(map(repr, missing))}; the parameters of this module "
                f"are {', '.join(map(repr, self._initial))}"
            ) from None
        known = len(tensors) == len(self._bound) and all(map(_same, tensors, self._bound))
        if known and not self._holds:
            return
        for (name, initial), tensor in zip(self._initial.items(), tensors, strict=True):
            if tensor.shape != initial.shape:
                raise ProblemError(
                    f"params[{name!r}] has shape {tuple(tensor.shape)}, but the parameter of the "
                    f"module has shape {tuple(initial.shape)}"
                )
        for name, owner, local in self._places:
            owner[local] = params[name]
        self._bound = tensors


def _checkpoints(part: nn.Module) -> bool:
    """Whether the module's own source code mentions checkpoints."""
    kinds = [k for k in type(part).__mro__ if not k.__module__.startswith("torch.")]
    codes = [getattr(f, "__code__", None) for k in kinds for f in vars(k).values()]
    return any("checkpoint" in name for code in codes if code for name in code.co_names)


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other
