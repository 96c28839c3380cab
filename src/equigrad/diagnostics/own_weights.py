"""Detects modules that compute with their own weights when they are called with others."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.utils.checkpoint import CheckpointError

from equigrad.errors import ProblemError


@dataclass(frozen=True)
class Caller:
    """The caller of a module, and how messages refer to it: by default, a loss of the user.

    Attributes:
        moves: whether the module's own weights may differ from the given ones, so that it must not
            compute with its own weights in the backward.
        held: advice for a parameter that the module holds twice.
        changing: the consequence of a call that changes the next one.
        state: where else a state may be; a note inserts the problem's class.
    """

    moves: bool = True
    held: str = "Call it by equigrad.nn.Functional(module), which replaces all of them"
    changing: str = (
        "Every phase begins with the state after the free phase, and the state of the module is "
        "restored at the end; the gradient is that of a loss that changes during training"
    )
    state: str = "outside of the modules that it is seen to call (give them to {}(modules=…))"


class OwnWeights:
    """Shifts the own weights of modules while they are called with other weights.

    `torch.func.functional_call` replaces a module's parameters by other tensors during a call. The
    result then depends on the module's own weights only if it holds them a second time, or computes
    again in the backward (gradient checkpointing). A shift of the own weights shows this.

    Args:
        modules: modules that a loss may call. Compiled ones, which allow no hooks, are left out.

    Attributes:
        names: names of the parameters that were replaced so far.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._roots = [
            (root, [p for path, part in root.named_modules() for p in _places(path, part)])
            for root in modules
            if not any(map(_compiled, root.modules()))
        ]
        self._inner = {id(part): i for i, (r, _) in enumerate(self._roots) for part in r.modules()}
        self._kept: dict[int, tuple[nn.Parameter, Tensor]] = {}
        self._within: nn.Module | None = None
        self._replaced: dict[int, nn.Parameter] = {}
        self.names: list[str] = []

    @contextmanager
    def shifted_in_calls(self) -> Iterator[None]:
        """A context in which own weights are shifted during calls with other weights."""
        if not self._roots:
            yield
            return
        handles = [
            hooks.register_module_forward_pre_hook(self._enter),
            hooks.register_module_forward_hook(self._leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._put_back()

    @contextmanager
    def shifted(self) -> Iterator[None]:
        """A context for the backward of such calls, in which own weights are shifted."""
        self._shift(self._replaced.values())
        try:
            yield
        finally:
            self._put_back()

    def _enter(self, module: nn.Module, args: Any) -> None:
        root = self._inner.get(id(module))
        if root is None or self._within is not None:
            return
        places = self._roots[root][1]
        found = [(n, own) for n, slots, local, own in places if slots.get(local) is not own]
        if found:
            self._within = module
            self.names += [n for n, own in found if id(own) not in self._replaced]
            self._replaced.update((id(own), own) for _, own in found)
            try:
                self._shift([own for _, own in found])
            except RuntimeError:  # a transform of torch.func allows no writing here
                self._kept.clear()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if module is self._within:
            self._put_back()

    @torch.no_grad()
    def _shift(self, weights: Iterable[nn.Parameter]) -> None:
        for own in weights:
            self._kept[id(own)] = own, own.detach().clone()
            own.data.add_(0.5 + 0.5 * own.data.abs())

    @torch.no_grad()
    def _put_back(self) -> None:
        for own, value in self._kept.values():
            own.data.copy_(value)
        self._kept.clear()
        self._within = None


def _compiled(part: nn.Module) -> bool:
    """Whether `torch.compile` made this module or compiled its calls."""
    return type(part).__name__ == "OptimizedModule" or part._compiled_call_impl is not None


@contextmanager
def backward_explained() -> Iterator[None]:
    """A context that explains errors of torch's backward pass.

    Raises:
        ProblemError: in place of torch's own error.
    """
    try:
        yield
    except RuntimeError as error:
        said = str(error)
        if "backward through the graph a second time" in said:
            what = (
                "a loss or the map uses a tensor with the graph of an earlier call, which is kept "
                "in a buffer, an attribute or a variable; store "
            )
            mend = "the .detach() of it"
        elif "use_reentrant" in said or "Checkpointing is not compatible" in said:
            what = (
                "reentrant gradient checkpoints do not work with torch.autograd.grad, which "
                "equigrad uses; set "
            )
            mend = "use_reentrant=False"
        elif isinstance(error, CheckpointError):
            what = "gradient checkpointing computed something else in the backward pass; call "
            mend = "the module by equigrad.nn.Functional(module), or switch checkpointing off"
        else:
            raise
        raise ProblemError(f"{what}{mend} ({said.splitlines()[0]})") from error


def _places(path: str, part: nn.Module) -> Iterator[tuple[str, dict[str, Any], str, nn.Parameter]]:
    """A module's own parameters, with the dictionary and key that hold each."""
    if isinstance(part, torch.jit.ScriptModule):
        return
    slots: dict[str, Any] = part._parameters
    for local, own in slots.items():
        if isinstance(own, nn.Parameter) and own.requires_grad:
            yield f"{path}.{local}".lstrip("."), slots, local, own


def padding_rows(modules: Iterable[nn.Module]) -> Iterator[tuple[str, int]]:
    """Padding rows of embeddings, which get no gradient."""
    for module in modules:
        for path, part in module.named_modules():
            if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.padding_idx is not None:
                yield f"{path}.weight".lstrip("."), part.padding_idx
