"""What torch's optimisers do in a step, as arithmetic that can be differentiated.

A rule takes a parameter p, the velocity v there (minus the gradient, or the gradient to maximise),
its buffers, the settings under torch's names, and the number t of the step, from 1. It returns p
and the buffers after the step, and changes nothing. Settings may be tensors with a graph. Where a
square root meets zero, what comes from there has the derivative zero, as that of |v| at v = 0.

A first moment is that of v, and has the sign opposite to torch's: to turn the sign of every
gradient, and of its derivative, would take a tenth of a small model's time.
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
        buffers: how many a parameter has, used or not.
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
    # the product of all of them so far; its buffer begins at zero
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
"""By torch's class, and by no subclass of it, which may do something else."""


def root(square: Tensor) -> Tensor:
    """The square root; next to zero, it is that of the least normal number."""
    return (square + torch.finfo(square.dtype).tiny).sqrt()


def toward(mean: Tensor, new: Tensor, share: Any) -> Tensor:
    """A running mean, a share of the way to what is new."""
    if isinstance(share, Tensor):  # whose dtype may be another
        return mean + share * (new - mean)
    return mean.lerp(new, share)


def is_zero(setting: Any) -> bool:
    """Whether a setting is left out, and not a tensor that happens to be zero."""
    return not isinstance(setting, Tensor) and setting == 0


def _pulled(p: Tensor, v: Tensor, o: dict[str, Any]) -> Tensor:
    """The velocity with the weight decay in it."""
    return v if is_zero(o["weight_decay"]) else v + -o["weight_decay"] * p


def _decayed(p: Tensor, v: Tensor, o: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The weight decay: beside the velocity, or in it."""
    if not o["decoupled_weight_decay"] or is_zero(o["weight_decay"]):
        return p, _pulled(p, v, o)
    return p * (1 - o["lr"] * o["weight_decay"]), v
