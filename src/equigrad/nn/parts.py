"""Parts of a network, called with given parameters."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from equigrad.problems import Params


class Parts:
    """The parameter names of a network's parts, to call a part with weights from `meta_params`.

    Tied weights are one parameter, under the first of their names.

    Args:
        network: the whole network.
        paths: paths of the parts, as `get_submodule` takes them.
    """

    def __init__(self, network: nn.Module, paths: list[str]) -> None:
        first: dict[int, str] = {}
        for name, p in network.named_parameters(remove_duplicate=False):
            first.setdefault(id(p), name)
        self._names = {
            path: [
                (first[id(p)], own)
                for own, p in network.get_submodule(path).named_parameters(remove_duplicate=False)
            ]
            for path in paths
        }

    def bind(self, network: nn.Module, path: str, meta_params: Params) -> Callable[..., Tensor]:
        """A part of the network, or of a copy of it, with these parameters, as a function."""
        part = network.get_submodule(path)
        weights = {own: meta_params[full] for full, own in self._names[path]}
        own = _all_own(part, weights)

        def call(*inputs: Tensor) -> Tensor:
            if own and not torch.is_grad_enabled():  # the part already holds these values
                return part(*inputs)
            return functional_call(part, weights, inputs)

        return call


def _all_own(part: nn.Module, weights: Params) -> bool:
    """Whether these are the part's own parameters, or views with the same memory and shape."""
    return all(
        p.data_ptr() == (given := weights[name]).data_ptr()
        and p.stride() == given.stride()
        and p.shape == given.shape
        and p.dtype == given.dtype
        for name, p in part.named_parameters(remove_duplicate=False)
    )
