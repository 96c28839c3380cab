"""Few-shot methods: which parameters tasks share, and the estimator of their meta-gradient."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch.nn import Module

from equigrad.estimators import (
    IMAML,
    MAML,
    Contrastive,
    Estimator,
    FirstOrderMAML,
    LeastControl,
    Reptile,
)
from equigrad.nn import ComplexSynapse, LearnedRates, LearnedStart, Modulation
from equigrad.tasks.learner import MetaModel

FewShotMethodName = Literal[
    "contrastive-modulation",
    "contrastive-synaptic",
    "least-control-modulation",
    "least-control-synaptic",
    "imaml",
    "maml",
    "meta-sgd",
    "first-order-maml",
    "reptile",
    "scratch",
]


@dataclass(frozen=True)
class Method:
    """A way to learn from tasks.

    Attributes:
        label: its name in words.
        division: of a network, with a strength λ and a step size, into what a task learns and what
            tasks share.
        estimator: the class of the estimator of the meta-gradient.
    """

    label: str
    division: Callable[[Module, float, float], MetaModel]
    estimator: type[Estimator]


def _synapse(network: Module, strength: float, rate: float) -> ComplexSynapse:
    return ComplexSynapse(network, strength, center="init", learn=("center",))


def _modulation(network: Module, strength: float, rate: float) -> Modulation:
    return Modulation(network)


def _start(network: Module, strength: float, rate: float) -> LearnedStart:
    return LearnedStart(network)


def _rates(network: Module, strength: float, rate: float) -> LearnedRates:
    return LearnedRates(network, rate)


FEW_SHOT_METHODS: dict[FewShotMethodName, Method] = {
    "contrastive-modulation": Method("contrastive, modulation", _modulation, Contrastive),
    "contrastive-synaptic": Method("contrastive, synaptic", _synapse, Contrastive),
    "least-control-modulation": Method("least control, modulation", _modulation, LeastControl),
    "least-control-synaptic": Method("least control, synaptic", _synapse, LeastControl),
    "imaml": Method("iMAML", _synapse, IMAML),
    "maml": Method("MAML", _start, MAML),
    "meta-sgd": Method("Meta-SGD", _rates, MAML),
    "first-order-maml": Method("first-order MAML", _start, FirstOrderMAML),
    "reptile": Method("Reptile", _start, Reptile),
    "scratch": Method("from scratch", _start, FirstOrderMAML),
}
"""The methods; the last one trains on each task from a random start, and shares nothing."""
