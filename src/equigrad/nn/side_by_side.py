"""Many copies of one network at once, each with its own parameters and inputs."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.functional import conv1d, conv2d, conv3d

from equigrad.attributes import KeptAttributes
from equigrad.errors import ConfigurationError, ProblemError
from equigrad.fields import expect
from equigrad.nn.batch_statistics import BatchStatistics, with_batch_statistics
from equigrad.nn.functional import Functional
from equigrad.problems import Params

Layout = torch.memory_format | None
"""The memory format of images that are convolved; None for the one that they have."""

WORTH = 0.85
"""Share of the loop's time that another batching must stay below for `auto` to choose it.

A smaller saving, measured by itself, may be lost to the larger blocks of memory that it needs."""

Batching = Literal["auto", "loop", "vmap", "grouped", "grouped channels-last"]
"""How copies are computed: in turn, by `torch.func.vmap`, or as groups of channels."""


class SideBySide:
    """A module whose parameters, inputs and outputs have one more, leading dimension of tasks.

    The outputs are the same to rounding for every batching:

    - `loop`: one copy after the other.
    - `vmap`: all at once by `torch.func.vmap`, whatever the module.
    - `grouped`: the copies' channels side by side as groups of one wide network, for a
      `Sequential` of convolutions, linear layers, batch normalisation, pooling and activations;
      `grouped channels-last` lays images out with channels last where a convolution has groups.
    - `auto`: the fastest one, by a short measurement for every new combination of shapes.
      Since timings decide, two runs can differ by rounding. A batching that the module does not
      allow is not chosen; LSTMs and branches on values, for example, do not allow `vmap`.

    Batch normalisation uses the statistics of each copy's own batch.

    Args:
        model: any module. It is copied, never changed.
        batching: how to compute the copies.

    Raises:
        ConfigurationError: an unknown batching, or one that this module does not allow.

    Example:
        >>> net = SideBySide(nn.Linear(3, 2))
        >>> params = {name: p.expand(4, *p.shape) for name, p in net.params().items()}
        >>> net(params, torch.randn(4, 5, 3)).shape
        torch.Size([4, 5, 2])
    """

    def __init__(self, model: nn.Module, batching: Batching = "auto") -> None:
        expect(Batching, batching=batching)
        self._one = Functional(with_batch_statistics(model))
        self._shapes = {name: p.shape for name, p in self._one.params().items()}
        self._norms = [m for m in self._one.model.modules() if isinstance(m, BatchStatistics)]
        self._held = KeptAttributes([self._one.model]).snapshot()
        self._remembers: bool | None = None
        self._layers = _layers(self._one.model, set(self._shapes))
        self.batching = batching
        if batching.startswith("grouped") and self._layers is None:
            raise ConfigurationError(
                f"batching={batching!r} supports only a Sequential of convolutions, linear "
                f"layers, batch normalisation, pooling and activations, and "
                f"{type(model).__name__} is not one; use batching='vmap', 'loop' or 'auto'"
            )
        self._chosen: dict[object, Callable[[Params, Tensor], Tensor]] = {}

    def params(self) -> dict[str, Tensor]:
        """The original parameters of one copy, in new tensors."""
        return self._one.params()

    def __call__(
        self,
        params: Params,
        x: Tensor,
        *,
        reference: int | None = None,
        second_order: bool = False,
        training: bool = True,
    ) -> Tensor:
        """The outputs of every copy.

        Args:
            params: parameters by the module's names, of shape tasks × the parameter's shape; one of
                the parameter's own shape is shared by all copies.
            x: inputs, of shape tasks × n × ….
            reference: number of first rows of each task that batch normalisation takes its
                statistics from; all rows if None.
            second_order: whether the derivatives will be differentiated again, which `auto` then
                measures.
            training: whether the module is in training mode, with dropout, or in `eval` mode.

        Returns:
            Outputs of shape tasks × n × ….

        Raises:
            ProblemError: a parameter is missing or has another shape.
        """
        stacked = {name: self._stacked(name, params, len(x)) for name in self._shapes}
        for norm in self._norms:
            norm.reference, norm.twice = reference, second_order
        if self._one.model.training != training:
            self._one.model.train(training)
        return self._compute(stacked, x, second_order)(stacked, x)

    def _stacked(self, name: str, params: Params, tasks: int) -> Tensor:
        shape = self._shapes[name]
        if name not in params:
            raise ProblemError(
                f"params has no {name!r}; the parameters of this module are "
                f"{', '.join(self._shapes)}"
            )
        given = params[name]
        if given.shape == shape:
            return given.expand(tasks, *shape)
        if given.shape == (tasks, *shape):
            return given
        raise ProblemError(
            f"params[{name!r}] must have shape {tuple(shape)} for all tasks, or {(tasks, *shape)} "
            f"for {tasks} of them, got {tuple(given.shape)}"
        )

    def _compute(
        self, params: Params, x: Tensor, second_order: bool
    ) -> Callable[[Params, Tensor], Tensor]:
        batchings: dict[str, Callable[[Params, Tensor], Tensor]] = {
            "loop": self._loop,
            "grouped": self._grouped,
            "grouped channels-last": self._grouped_channels_last,
            "vmap": self._vmap,
        }
        if self.batching != "auto":
            return batchings[self.batching]
        learning = tuple(p.requires_grad and torch.is_grad_enabled() for p in params.values())
        mode = (self._reference, second_order, self._one.model.training)
        lower = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if lower else x.dtype
        key = (x.shape, dtype, x.device, learning, mode)
        if key not in self._chosen:
            # of the loop one copy tells enough, and takes no memory that the others cannot reuse
            one = {name: p[:1] for name, p in params.items()}
            seconds = {"loop": len(x) * self._seconds(self._loop, one, x[:1], second_order)}
            groups = ["grouped", "grouped channels-last"][: 1 + (x.ndim == 5)]
            for name in (*(groups if self._layers is not None else ()), "vmap"):
                if name == "vmap" and len(seconds) > 1:
                    break  # vmap makes groups of convolutions, too, in more time and memory
                try:
                    seconds[name] = self._seconds(batchings[name], params, x, second_order)
                except (ConfigurationError, RuntimeError):  # the loop has shown that x is fine
                    continue
            fastest = min(seconds, key=lambda name: seconds[name])
            if seconds[fastest] > WORTH * seconds["loop"]:
                fastest = "loop"
            self._chosen[key] = batchings[fastest]
        return self._chosen[key]

    @property
    def _reference(self) -> int | None:
        return self._norms[0].reference if self._norms else None

    def _seconds(
        self,
        batching: Callable[[Params, Tensor], Tensor],
        params: Params,
        x: Tensor,
        second_order: bool,
    ) -> float:
        """The seconds that one evaluation takes, with the requested derivatives."""
        own = {n: p.detach().requires_grad_(p.requires_grad) for n, p in params.items()}
        leaves = [p for p in own.values() if p.requires_grad]
        best = float("inf")
        with torch.random.fork_rng(devices=[]):
            for _ in range(4):  # the first warms up
                began = _now(x.device)
                out = batching(own, x).square().mean()
                if out.requires_grad:
                    grads = torch.autograd.grad(
                        out, leaves, create_graph=second_order, allow_unused=True
                    )
                    if second_order:
                        norm = torch.stack([g.square().sum() for g in grads if g is not None]).sum()
                        torch.autograd.grad(norm, leaves, allow_unused=True)
                best = min(best, _now(x.device) - began)
        return best

    def _loop(self, params: Params, x: Tensor) -> Tensor:
        each = {name: p.unbind() for name, p in params.items()}
        return torch.stack(
            [self._copy({n: p[i] for n, p in each.items()}, o) for i, o in enumerate(x.unbind())]
        )

    def _vmap(self, params: Params, x: Tensor) -> Tensor:
        return vmap(self._copy, randomness="different")(dict(params), x)

    def _copy(self, params: Params, x: Tensor) -> Tensor:
        """One copy's outputs; changes of the module's own state, such as a counter, are undone."""
        out = self._one(params, x)
        if self._remembers is None:
            self._remembers = any(True for _ in self._held.changed())
        if self._remembers:
            self._held.restore()
        return out

    def _grouped(
        self, params: Params, x: Tensor, memory_format: torch.memory_format | None = None
    ) -> Tensor:
        assert self._layers is not None
        tasks, n = x.shape[:2]
        if x.ndim == 3 and all(type(layer) in _DENSE for _, layer in self._layers):
            for prefix, layer in self._layers:
                own = {name: params[prefix + name] for name, _ in layer.named_parameters()}
                x = _dense(layer, own, x)
            return x
        x = x.transpose(0, 1).reshape(n, -1, *x.shape[3:])
        for prefix, layer in self._layers:
            own = {name: params[prefix + name] for name, _ in layer.named_parameters()}
            x = _BESIDE[type(layer)](layer, own, x, tasks, memory_format)
        return x.reshape(n, tasks, -1, *x.shape[2:]).transpose(0, 1)

    def _grouped_channels_last(self, params: Params, x: Tensor) -> Tensor:
        return self._grouped(params, x, torch.channels_last)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _layers(model: nn.Module, names: set[str]) -> list[tuple[str, nn.Module]] | None:
    """The layers in order, with the prefixes of their parameters; None if one is unknown.

    Frozen parameters, and parameters shared by two layers, are not among the names.
    """
    found = list(_walk(model, ""))
    known = all(type(layer) in _BESIDE and _plain(layer) for _, layer in found)
    here = {prefix + name for prefix, layer in found for name, _ in layer.named_parameters()}
    return found if known and here == names else None


def _walk(part: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    if type(part) is not nn.Sequential:
        yield prefix, part
        return
    for name, child in part._modules.items():
        if child is not None:
            yield from _walk(child, f"{prefix}{name}.")


def _plain(layer: nn.Module) -> bool:
    """Whether a layer uses only options that its grouped counterpart below knows."""
    if isinstance(layer, nn.Flatten):
        return (layer.start_dim, layer.end_dim) == (1, -1)
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    return getattr(layer, "padding_mode", "zeros") == "zeros" and not hooked


def _as_is(
    layer: nn.Module, own: Mapping[str, Tensor], x: Tensor, tasks: int, layout: Layout
) -> Tensor:
    return layer(x)  # channel by channel


def _norm(
    layer: BatchStatistics, own: Mapping[str, Tensor], x: Tensor, tasks: int, layout: Layout
) -> Tensor:
    wide = {name: p.reshape(-1) for name, p in own.items()}
    last = _channels_last(x)
    return layer.normalise(x, wide.get("weight"), wide.get("bias"), channels_last=last)


def _channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _linear(
    layer: nn.Linear, own: Mapping[str, Tensor], x: Tensor, tasks: int, layout: Layout
) -> Tensor:
    if x.ndim != 2:
        raise ConfigurationError(
            f"batching='grouped' supports linear layers whose input has the shape n × features, "
            f"but the input of this one has {x.ndim} dimensions; use batching='vmap' or 'loop'"
        )
    out = _dense(layer, own, x.reshape(len(x), tasks, -1).transpose(0, 1))
    return out.transpose(0, 1).reshape(len(x), -1)


def _dense(layer: nn.Module, own: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """A layer that acts on each row by itself, on inputs of shape tasks × n × features."""
    if not isinstance(layer, nn.Linear):
        return layer(x)
    weight, bias = own["weight"].transpose(1, 2), own.get("bias")
    return x @ weight if bias is None else torch.baddbmm(bias.unsqueeze(1), x, weight)


def _convolution(
    convolve: Callable[..., Tensor],
) -> Callable[[nn.Module, Mapping[str, Tensor], Tensor, int, Layout], Tensor]:
    def beside(
        layer: nn.Module, own: Mapping[str, Tensor], x: Tensor, tasks: int, layout: Layout
    ) -> Tensor:
        assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        shared = tasks > 1 and all(p.stride(0) == 0 for p in own.values())
        # an ordinary convolution of tasks · n images is faster than one in groups; its images are a
        # view of the wide ones as they lie, but with channels last they would be copies, both ways
        if shared:
            convolved = [p[0] for p in own.values()]
            inputs, groups = x.reshape(len(x) * tasks, -1, *x.shape[2:]), layer.groups
        else:
            convolved = [p.flatten(0, 1) for p in own.values()]
            inputs, groups = x, tasks * layer.groups
        weight, bias = convolved[0], convolved[1] if len(convolved) > 1 else None
        if layout is not None and x.ndim == 4 and not shared:
            weight = weight.contiguous(memory_format=layout)
            inputs = inputs.contiguous(memory_format=layout)
        out = convolve(
            inputs,
            weight,
            bias,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=groups,
        )
        return out.reshape(len(x), -1, *out.shape[2:]) if shared else out

    return beside


_DENSE = (
    *(nn.Identity, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid),
    *(nn.Hardtanh, nn.Hardsigmoid, nn.Softplus, nn.Dropout, nn.Linear),
)

_CHANNELWISE = (
    *(nn.Flatten, *_DENSE),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
)

_BESIDE: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: _convolution(conv1d),
    nn.Conv2d: _convolution(conv2d),
    nn.Conv3d: _convolution(conv3d),
    BatchStatistics: _norm,
    **dict.fromkeys(_CHANNELWISE, _as_is),
    nn.Linear: _linear,
}
"""How a layer acts on inputs of shape n × (tasks · channels) × …, grouped by task."""
