"""Mini-batch training of networks whose neurons settle for every example."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from equigrad.errors import ConfigurationError
from equigrad.estimators import Estimator
from equigrad.evaluation import Evaluation
from equigrad.fields import MOST, Count, Infinite, NotNegative, Positive, expect, require
from equigrad.gradient import MetaGradient, meta_gradient
from equigrad.problems import Params, Problem
from equigrad.solvers import Solver
from equigrad.training.loop import Callback, OuterState, descend


class SettlingNetwork(Protocol):
    """A network whose neurons settle: `equigrad.nn.Hopfield`, for example.

    θ are its parameters. Losses and energies are sums over examples, so that nudging and control
    do not depend on their number.
    """

    def start(self, x: Tensor) -> dict[str, Tensor]:
        """Initial state of the neurons, by name; the first dimension counts examples."""
        ...

    def problem(self, x: Tensor, y: Tensor) -> Problem:
        """The network as a problem, with the loss against targets y summed over examples."""
        ...

    def logits(self, params: Params, meta_params: Params) -> Tensor:
        """The output of the settled network: examples × classes."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters θ, as for any `torch.nn.Module`."""
        ...


def train_network(
    network: SettlingNetwork,
    examples: tuple[Tensor, Tensor],
    *,
    solver: Solver,
    estimator: Estimator,
    optimizer: torch.optim.Optimizer,
    epochs: float,
    batch_size: int,
    seed: int = 0,
    clip: float | None = None,
    limit: float = math.inf,
    validate: Callable[[], Mapping[str, float]] | None = None,
    callbacks: Sequence[Callback] = (),
) -> OuterState:
    """Train a network that settles by mini-batch steps along the estimated gradient.

    Args:
        network: the network; its parameters are updated in place, except frozen ones.
        examples: inputs and targets. An epoch sees the examples in an order that depends on seed
            and epoch; those that do not fill a batch are left out of that epoch.
        solver: settles the neurons of a batch.
        estimator: estimates the gradient of the summed loss, which is divided by the batch size.
        optimizer: optimiser of the network's parameters.
        epochs: total number of epochs, including those before a resume; at least one step is taken
            if this is not zero.
        batch_size: number of examples in a mini-batch.
        seed: seed of the order.
        clip: largest norm of the gradient; larger gradients are scaled down.
        limit: seconds after which no further step begins.
        validate: computes metrics of the current network, after every epoch and at the end.
        callbacks: watch the loop.

    Returns:
        The state after the last step.

    Raises:
        ConfigurationError: inputs and targets differ in number, batch_size is not a whole number
            between one and the number of examples, epochs < 0, clip ≤ 0, or all parameters of the
            network are frozen.
    """
    x, y = examples
    if len(x) != len(y):
        raise ConfigurationError(f"there are {len(x)} inputs, but {len(y)} targets")
    expect(Count, batch_size=batch_size)
    require(
        batch_size <= len(x),
        f"batch_size must be at most the number of examples, {len(x)}, got {batch_size}",
    )
    expect(NotNegative | Infinite, epochs=epochs)
    expect(int, seed=seed)
    expect(Positive | None, clip=clip)
    meta_params: dict[str, Tensor] = dict(network.named_parameters())
    learned = {name: p for name, p in meta_params.items() if p.requires_grad}
    if not learned:
        raise ConfigurationError(
            "all parameters are frozen (requires_grad=False), so there is nothing to learn"
        )
    each = len(x) // batch_size
    order: dict[int, Tensor] = {}

    def rows(step: int) -> Tensor:
        epoch, batch = divmod(step, each)
        if epoch not in order:
            order.clear()
            generator = torch.Generator().manual_seed((1_000_003 * seed + epoch) % MOST)
            order[epoch] = torch.randperm(len(x), generator=generator).to(x.device)
        return order[epoch][batch * batch_size : (batch + 1) * batch_size]

    def gradient(state: OuterState) -> MetaGradient:
        chosen = rows(state.step)
        inputs = x[chosen]
        result = meta_gradient(
            network.problem(inputs, y[chosen]),
            network.start(inputs),
            meta_params,
            solver=solver,
            estimator=estimator,
        )
        grads = {name: result.grads[name] for name in learned}
        return _averaged(replace(result, grads=grads), batch_size, clip)

    def evaluate(state: OuterState, result: MetaGradient) -> Mapping[str, float]:
        if validate is None or not ((state.step + 1) % each == 0 or state.ends):
            return {}
        return validate()

    return descend(
        gradient,
        learned,
        optimizer=optimizer,
        steps=epochs if math.isinf(epochs) else max(round(epochs * each), int(epochs > 0)),
        limit=limit,
        evaluate=evaluate,
        callbacks=callbacks,
    )


def _averaged(result: MetaGradient, count: int, clip: float | None) -> MetaGradient:
    """The gradient of the mean loss over examples, clipped."""
    scale = 1 / count
    if clip is not None:
        norm = torch.stack([g.norm() for g in result.grads.values()]).norm().item() / count
        scale *= min(1.0, clip / norm) if norm else 1.0
    grads = {name: scale * g for name, g in result.grads.items()}
    return replace(result, grads=grads, outer_loss=result.outer_loss / count)


@torch.no_grad()
def settled_logits(
    network: SettlingNetwork, x: Tensor, *, solver: Solver, batch_size: int = 1000
) -> tuple[Tensor, list[int]]:
    """Settle the network for every input, and return its logits.

    Args:
        network: the network.
        x: inputs; the first dimension counts examples.
        solver: settles the neurons.
        batch_size: number of inputs that settle at once.

    Returns:
        Logits, examples × classes; and the indices of inputs for which the network has not settled.
        Without a tolerance, these are all inputs of a batch in which the residual grew.
    """
    meta_params: dict[str, Tensor] = dict(network.named_parameters())
    said: list[Tensor] = []
    unsettled: list[int] = []
    for first, inputs in zip(range(0, len(x), batch_size), x.split(batch_size), strict=True):
        nothing = torch.zeros(len(inputs), dtype=torch.long, device=x.device)
        problem = network.problem(inputs, nothing)
        with Evaluation(problem, network.start(inputs), meta_params) as evaluation:
            settled = evaluation.settle(solver)
        said.append(network.logits(settled.params, meta_params))
        if settled.phase.failed:
            rows = settled.phase.unsettled or range(len(inputs))
            unsettled += [first + row for row in rows]
    return torch.cat(said), unsettled


def classify(
    network: SettlingNetwork, x: Tensor, *, solver: Solver, batch_size: int = 1000
) -> Tensor:
    """Settle the network for every input, and return the class with the largest logit.

    Args:
        network: the network.
        x: inputs; the first dimension counts examples.
        solver: settles the neurons.
        batch_size: number of inputs that settle at once.

    Returns:
        A class for every input.
    """
    return settled_logits(network, x, solver=solver, batch_size=batch_size)[0].argmax(1)
