"""Parts of a network, called with other parameters than their own."""

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from equigrad.problems import Params


class Parts:
    """Names of the parameters of a network's parts, for calls with what `meta_params` holds.

    Weights that are tied are one parameter, by the first of their names.

    Args:
        network: the whole.
        paths: of the parts, as `get_submodule` knows them.
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

    def call(self, network: nn.Module, path: str, meta_params: Params, *inputs: Any) -> Tensor:
        """What a part of the network, or of a copy of it, computes with these parameters."""
        weights = {own: meta_params[full] for full, own in self._names[path]}
        return functional_call(network.get_submodule(path), weights, inputs)
