"""The Hebbian product of a connection: presynaptic times postsynaptic activity."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

from equigrad.errors import ConfigurationError

Back = Callable[[Tensor], Tensor]
"""Maps activity behind a part of a connection back to the neurons in front of it."""


def coactivity(connection: nn.Module, before: Tensor, after: Tensor) -> dict[str, Tensor]:
    r"""`∂⟨after, connection(before)⟩/∂θ` by products of activities, without autograd.

        ∂Φ/∂W = Σ_samples after beforeᵀ,    ∂Φ/∂b = Σ_samples after

    so that a synapse needs only the activities of the two neurons that it connects (Scellier,
    Bengio 2017). A kernel weight sums over all positions where it is used; activity behind a
    pooling is mapped back to the positions that the pooling selected (Laborieux et al. 2021).

    Args:
        connection: a `Linear` or a `Conv2d`, or a `Sequential` of one of them and any number of
            `Flatten`, `AvgPool2d` and `MaxPool2d`.
        before: activity of the presynaptic neurons; samples first.
        after: activity of the postsynaptic neurons.

    Returns:
        One tensor for each parameter of the connection, by name.

    Raises:
        ConfigurationError: the connection has no such product in closed form.

    Example:
        >>> before, after = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])
        >>> coactivity(nn.Linear(2, 1), before, after)
        {'weight': tensor([[3., 6.]]), 'bias': tensor([3.])}
    """
    chain = isinstance(connection, nn.Sequential)
    parts = list(connection.named_children()) if chain else [("", connection)]
    weighted = [i for i, (_, part) in enumerate(parts) if [*part.parameters()]]
    if len(weighted) != 1:
        raise ConfigurationError(
            f"a Hebbian product needs connections with exactly one Linear or Conv2d each, but "
            f"this one has {len(weighted)} parts with weights: {connection}"
        )
    (at,) = weighted
    with torch.no_grad():
        for _, part in parts[:at]:
            before = part(before)
        activity, backs = parts[at][1](before), []
        for _, part in parts[at + 1 :]:
            backs.append(_back(part, activity))
            activity = part(activity)
        for back in reversed(backs):
            after = back(after)
        name, part = parts[at]
        products = _products(part, before, after)
    return {f"{name}.{n}" if name else n: product for n, product in products.items()}


def _products(part: nn.Module, before: Tensor, after: Tensor) -> dict[str, Tensor]:
    """The Hebbian products of a layer with weights."""
    if type(part) is nn.Linear:
        product = torch.einsum("n...i,n...j->ij", after, before)
        total = after.reshape(-1, after.shape[-1]).sum(0)
    elif (
        type(part) is nn.Conv2d
        and part.groups == 1
        and part.padding_mode == "zeros"
        and not isinstance(part.padding, str)
    ):
        patches = unfold(before, part.kernel_size, part.dilation, part.padding, part.stride)
        product = torch.einsum("nip,njp->ij", after.flatten(2), patches).view_as(part.weight)
        total = after.sum((0, 2, 3))
    else:
        raise _unknown(part)
    return {"weight": product} if part.bias is None else {"weight": product, "bias": total}


def _back(part: nn.Module, before: Tensor) -> Back:
    """The way back through a part without weights, given the activity at its input."""
    if isinstance(part, nn.Flatten):
        return lambda after: after.reshape(before.shape)
    if isinstance(part, nn.MaxPool2d):
        _, winners = nn.functional.max_pool2d(
            before,
            part.kernel_size,
            part.stride,
            part.padding,
            part.dilation,
            part.ceil_mode,
            return_indices=True,
        )

        def to_winners(after: Tensor) -> Tensor:
            back = torch.zeros_like(before).flatten(2)
            return back.scatter_add_(2, winners.flatten(2), after.flatten(2)).view_as(before)

        return to_winners
    if isinstance(part, nn.AvgPool2d) and _tiles(part):
        sides = part.kernel_size
        height, width = (sides, sides) if isinstance(sides, int) else sides

        def to_all(after: Tensor) -> Tensor:
            spread = after.repeat_interleave(height, 2).repeat_interleave(width, 3)
            back = torch.zeros_like(before)
            back[:, :, : spread.shape[2], : spread.shape[3]] = spread / (height * width)
            return back

        return to_all
    raise _unknown(part)


def _tiles(part: nn.AvgPool2d) -> bool:
    """Whether a pooling averages every position at most once, over whole kernels."""
    plain = not (part.padding or part.ceil_mode or part.divisor_override)
    return plain and part.kernel_size == part.stride


def _unknown(part: nn.Module) -> ConfigurationError:
    return ConfigurationError(
        f"Hebbian products do not support {part}. They support Linear and Conv2d without groups "
        f"and with numeric zero padding (but not subclasses), Flatten, MaxPool2d, and AvgPool2d "
        f"whose stride is its kernel size, without padding, ceil_mode or divisor_override"
    )
