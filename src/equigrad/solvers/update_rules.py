"""The update rules of torch's optimisers, as arithmetic that can be differentiated.

A rule takes a parameter p, the velocity v there (minus the gradient, or the gradient to maximise),
its buffers, the settings under torch's names, and the number t of the step, from 1. It returns p
and the buffers after the step, and changes nothing in place. Settings may be tensors with a graph.
The derivative of a square root at zero is taken to be zero.

A first moment is that of v, so that its sign is opposite to torch's: negating every gradient, and
its derivative, would take a tenth of a small model's time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Buffers = Sequence[Tensor]
Step = Callable[[Tensor, Tensor, Buffers, dict[str, Any], int], tuple[Tensor, list[Tensor]]]


@dataclass(frozen=True)
class UpdateRule:
    """One optimiser's step.

    Attributes:
        step: `(p, g, buffers, settings, t) -> p, buffers`.
        buffers: number of buffers of a parameter, used or not.
    """

    step: Step
    buffers: int


def sgd(
    p: Tensor, v: Tensor, buffers: Buffers, o: dict[str, Any], t: int
) -> tuple[Tensor, list[Tensor]]:
    """`torch.optim.SGD`."""
    v = _pulled(p, v, o)
    if is_zero(o["momentum"]):
        return p + o["lr"] * v, [*buffers]
    (m,) = buffers
    new = v if t == 1 or is_zero(o["dampening"]) else (1 - o["dampening"]) * v
    m = new if t == 1 else o["momentum"] * m + new
    move = v + o["momentum"] * m if o["nesterov"] else m
    return p + o["lr"] * move, [m]


def adam(
    p: Tensor, v: Tensor, buffers: Buffers, o: dict[str, Any], t: int
) -> tuple[Tensor, list[Tensor]]:
    """`torch.optim.Adam` and `AdamW`."""
    p, v = _decayed(p, v, o)
    m, square, top = buffers
    b1, b2 = o["betas"]
    m, square = toward(m, v, 1 - b1), b2 * square + (1 - b2) * v.square()
    largest = square
    if o["amsgrad"]:
        largest = top = torch.maximum(top, square)
    size = root(largest) / (1 - b2**t) ** 0.5 + o["eps"]
    return p + o["lr"] / (1 - b1**t) * m / size, [m, square, top]


def rmsprop(
    p: Tensor, v: Tensor, buffers: Buffers, o: dict[str, Any], t: int
) -> tuple[Tensor, list[Tensor]]:
    """`torch.optim.RMSprop`."""
    v = _pulled(p, v, o)
    square, mean, m = buffers
    alpha = o["alpha"]
    variance = square = alpha * square + (1 - alpha) * v.square()
    if o["centered"]:
        mean = toward(mean, v, 1 - alpha)
        variance = (square - mean.square()).clamp(min=0)
    move = v / (root(variance) + o["eps"])
    if not is_zero(o["momentum"]):
        move = m = o["momentum"] * m + move
    return p + o["lr"] * move, [square, mean, m]


def adagrad(
    p: Tensor, v: Tensor, buffers: Buffers, o: dict[str, Any], t: int
) -> tuple[Tensor, list[Tensor]]:
    """`torch.optim.Adagrad`."""
    v = _pulled(p, v, o)
    total = buffers[0] + v.square()
    if t == 1:
        total = total + o["initial_accumulator_value"]
    lr = o["lr"] / (1 + (t - 1) * o["lr_decay"])
    return p + lr * v / (root(total) + o["eps"]), [total]


def adamax(
    p: Tensor, v: Tensor, buffers: Buffers, o: dict[str, Any], t: int
) -> tuple[Tensor, list[Tensor]]:
    """`torch.optim.Adamax`."""
    v = _pulled(p, v, o)
    m, top = buffers
    b1, b2 = o["betas"]
    m, top = toward(m, v, 1 - b1), torch.maximum(b2 * top, v.abs() + o["eps"])
    return p + o["lr"] / (1 - b1**t) * m / top, [m, top]


def nadam(
    p: Tensor, v: Tensor, buffers: Buffers, o: dict[str, Any], t: int
) -> tuple[Tensor, list[Tensor]]:
    """`torch.optim.NAdam`."""
    p, v = _decayed(p, v, o)
    m, square, product = buffers
    b1, b2 = o["betas"]
    now, then = (b1 * (1 - 0.5 * 0.96 ** (k * o["momentum_decay"])) for k in (t, t + 1))
    # the product of these factors over all steps so far; its buffer starts at zero
    product = now * (1 if t == 1 else product) + torch.zeros_like(product)
    m, square = toward(m, v, 1 - b1), b2 * square + (1 - b2) * v.square()
    size = root(square / (1 - b2**t)) + o["eps"]
    move = (1 - now) / (1 - product) * v + then / (1 - product * then) * m
    return p + o["lr"] * move / size, [m, square, product]


def radam(
    p: Tensor, v: Tensor, buffers: Buffers, o: dict[str, Any], t: int
) -> tuple[Tensor, list[Tensor]]:
    """`torch.optim.RAdam`."""
    p, v = _decayed(p, v, o)
    m, square = buffers
    b1, b2 = o["betas"]
    m, square = toward(m, v, 1 - b1), b2 * square + (1 - b2) * v.square()
    move = m / (1 - b1**t)
    b2 = torch.as_tensor(b2, dtype=p.dtype if isinstance(b2, Tensor) else torch.float64)
    most = 2 / (1 - b2) - 1
    length = most - 2 * t * b2**t / (1 - b2**t)
    share = (length - 4) * (length - 2) * most / ((most - 4) * (most - 2) * length)
    # a share below zero belongs to a length that is not trusted
    rectified = root(share.clamp(min=0)) * (1 - b2**t) ** 0.5 / (root(square) + o["eps"])
    trusted = (length > 5.0).to(p.device)
    return p + o["lr"] * move * torch.where(trusted, rectified, 1.0).to(p.dtype), [m, square]


UPDATE_RULES: dict[type[torch.optim.Optimizer], UpdateRule] = {
    torch.optim.SGD: UpdateRule(sgd, 1),
    torch.optim.Adam: UpdateRule(adam, 3),
    torch.optim.AdamW: UpdateRule(adam, 3),
    torch.optim.RMSprop: UpdateRule(rmsprop, 3),
    torch.optim.Adagrad: UpdateRule(adagrad, 1),
    torch.optim.Adamax: UpdateRule(adamax, 2),
    torch.optim.NAdam: UpdateRule(nadam, 3),
    torch.optim.RAdam: UpdateRule(radam, 2),
}
"""Update rules by torch's class; a subclass may have another rule and is not included."""


def root(square: Tensor) -> Tensor:
    """The square root, with the smallest normal number added: its slope at zero is finite."""
    return (square + torch.finfo(square.dtype).tiny).sqrt()


def toward(mean: Tensor, new: Tensor, share: Any) -> Tensor:
    """The running mean after a new value that counts for a share of it."""
    if isinstance(share, Tensor):  # whose dtype may be another
        return mean + share * (new - mean)
    return mean.lerp(new, share)


def is_zero(setting: Any) -> bool:
    """Whether a setting is the number zero, and not a tensor that happens to be zero."""
    return not isinstance(setting, Tensor) and setting == 0


def _pulled(p: Tensor, v: Tensor, o: dict[str, Any]) -> Tensor:
    """The velocity plus the weight decay's pull."""
    return v if is_zero(o["weight_decay"]) else v + -o["weight_decay"] * p


def _decayed(p: Tensor, v: Tensor, o: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Parameter and velocity with the weight decay, decoupled or added to the velocity."""
    if not o["decoupled_weight_decay"] or is_zero(o["weight_decay"]):
        return p, _pulled(p, v, o)
    return p * (1 - o["lr"] * o["weight_decay"]), v
