"""The update rules of torch's optimisers, as arithmetic that can be differentiated.

A rule takes a parameter p, its gradient g, its buffers, the settings under torch's names, and the
number t of the step, from 1. It returns p and the buffers after the step, and changes nothing in
place. Settings may be tensors with a graph. The derivative of a square root at zero is taken to be
zero.
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
    p: Tensor, g: Tensor, buffers: Buffers, o: dict[str, Any], t: int
) -> tuple[Tensor, list[Tensor]]:
    """`torch.optim.SGD`."""
    g = _pulled(p, g, o)
    if is_zero(o["momentum"]):
        return p - o["lr"] * g, [*buffers]
    (m,) = buffers
    m = g if t == 1 else o["momentum"] * m + (1 - o["dampening"]) * g
    move = g + o["momentum"] * m if o["nesterov"] else m
    return p - o["lr"] * move, [m]


def adam(
    p: Tensor, g: Tensor, buffers: Buffers, o: dict[str, Any], t: int
) -> tuple[Tensor, list[Tensor]]:
    """`torch.optim.Adam` and `AdamW`."""
    p, g = _decayed(p, g, o)
    m, v, top = buffers
    b1, b2 = o["betas"]
    m, v = m + (1 - b1) * (g - m), b2 * v + (1 - b2) * g.square()
    largest = v
    if o["amsgrad"]:
        largest = top = torch.maximum(top, v)
    size = root(largest) / (1 - b2**t) ** 0.5 + o["eps"]
    return p - o["lr"] / (1 - b1**t) * m / size, [m, v, top]


def rmsprop(
    p: Tensor, g: Tensor, buffers: Buffers, o: dict[str, Any], t: int
) -> tuple[Tensor, list[Tensor]]:
    """`torch.optim.RMSprop`."""
    g = _pulled(p, g, o)
    square, mean, m = buffers
    alpha = o["alpha"]
    variance = square = alpha * square + (1 - alpha) * g.square()
    if o["centered"]:
        mean = mean + (1 - alpha) * (g - mean)
        variance = square - mean.square()
    move = g / (root(variance) + o["eps"])
    if not is_zero(o["momentum"]):
        move = m = o["momentum"] * m + move
    return p - o["lr"] * move, [square, mean, m]


def adagrad(
    p: Tensor, g: Tensor, buffers: Buffers, o: dict[str, Any], t: int
) -> tuple[Tensor, list[Tensor]]:
    """`torch.optim.Adagrad`."""
    g = _pulled(p, g, o)
    total = buffers[0] + g.square()
    if t == 1:
        total = total + o["initial_accumulator_value"]
    lr = o["lr"] / (1 + (t - 1) * o["lr_decay"])
    return p - lr * g / (root(total) + o["eps"]), [total]


def adamax(
    p: Tensor, g: Tensor, buffers: Buffers, o: dict[str, Any], t: int
) -> tuple[Tensor, list[Tensor]]:
    """`torch.optim.Adamax`."""
    g = _pulled(p, g, o)
    m, top = buffers
    b1, b2 = o["betas"]
    m, top = m + (1 - b1) * (g - m), torch.maximum(b2 * top, g.abs() + o["eps"])
    return p - o["lr"] / (1 - b1**t) * m / top, [m, top]


def nadam(
    p: Tensor, g: Tensor, buffers: Buffers, o: dict[str, Any], t: int
) -> tuple[Tensor, list[Tensor]]:
    """`torch.optim.NAdam`."""
    p, g = _decayed(p, g, o)
    m, v, product = buffers
    b1, b2 = o["betas"]
    now, then = (b1 * (1 - 0.5 * 0.96 ** (k * o["momentum_decay"])) for k in (t, t + 1))
    # the product of these factors over all steps so far; its buffer starts at zero
    product = now * (1 if t == 1 else product) + torch.zeros_like(product)
    m, v = m + (1 - b1) * (g - m), b2 * v + (1 - b2) * g.square()
    size = root(v / (1 - b2**t)) + o["eps"]
    move = (1 - now) / (1 - product) * g + then / (1 - product * then) * m
    return p - o["lr"] * move / size, [m, v, product]


def radam(
    p: Tensor, g: Tensor, buffers: Buffers, o: dict[str, Any], t: int
) -> tuple[Tensor, list[Tensor]]:
    """`torch.optim.RAdam`."""
    p, g = _decayed(p, g, o)
    m, v = buffers
    b1, b2 = o["betas"]
    m, v = m + (1 - b1) * (g - m), b2 * v + (1 - b2) * g.square()
    move = m / (1 - b1**t)
    b2 = torch.as_tensor(b2, dtype=p.dtype if isinstance(b2, Tensor) else torch.float64)
    most = 2 / (1 - b2) - 1
    length = most - 2 * t * b2**t / (1 - b2**t)
    share = (length - 4) * (length - 2) * most / ((most - 4) * (most - 2) * length)
    rectified = root(share) * (1 - b2**t) ** 0.5 / (root(v) + o["eps"])
    trusted = (length > 5.0).to(p.device)
    return p - o["lr"] * move * torch.where(trusted, rectified, 1.0).to(p.dtype), [m, v]


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
    """The square root, with a derivative of zero at zero."""
    return square.clamp(min=torch.finfo(square.dtype).tiny).sqrt()


def is_zero(setting: Any) -> bool:
    """Whether a setting is the number zero, and not a tensor that happens to be zero."""
    return not isinstance(setting, Tensor) and setting == 0


def _pulled(p: Tensor, g: Tensor, o: dict[str, Any]) -> Tensor:
    """The gradient plus the weight decay."""
    return g if is_zero(o["weight_decay"]) else g + o["weight_decay"] * p


def _decayed(p: Tensor, g: Tensor, o: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Parameter and gradient with the weight decay, decoupled or added to the gradient."""
    if not o["decoupled_weight_decay"] or is_zero(o["weight_decay"]):
        return p, _pulled(p, g, o)
    return p * (1 - o["lr"] * o["weight_decay"]), g
