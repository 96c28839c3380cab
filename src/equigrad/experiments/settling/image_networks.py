"""Networks that settle, for image classification, and the settings of their estimators."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Literal

from torch.nn import Tanh

from equigrad.controllers import Controller, DynamicInversion, EnergyInversion, LinearFeedback
from equigrad.estimators import Adjoint, Estimator, LeastControl, PhantomGradient
from equigrad.experiments.data import cifar10, mnist
from equigrad.experiments.runs.methods import PAPERS_RULE
from equigrad.nn.settling_networks import (
    Feedback,
    convolutional_equilibrium_network,
    convolutional_hopfield_network,
    hopfield_network,
    recurrent_tanh_network,
    relaxing_tanh_network,
)
from equigrad.solvers import Anderson, Picard, Solver

NetworkSettingName = Literal[
    "feed-forward", "recurrent", "hopfield", "cifar-implicit", "cifar-hopfield"
]
NetworkMethodName = Literal[
    "exact",
    "phantom-gradient",
    "dynamic-inversion",
    "energy-inversion",
    "kolen-pollack",
    "linear-feedback",
    "equilibrium-propagation",
]

SWEEPS = Picard(tol=1e-5, max_steps=10)
REST = Anderson(tol=1e-3, max_steps=30)

# b = gain / leak = 0.1, a tenth of the loss's own pressure: the paper's 10 left many samples of a
# batch unsettled, once weights had grown (docs/least-control.md)
INVERSION = DynamicInversion(gain=0.1, leak=1.0, solver=Anderson(tol=0.03, max_steps=30))

# from the free equilibrium, with room for the samples that take long: none was left over
BY_LEARNED_FEEDBACK = LeastControl(
    controller=replace(INVERSION, solver=Anderson(tol=0.03, max_steps=60)), start="free"
)

# the energy's curvature grows with the squares of the weights' norms, to 10 in ten epochs: damping
# makes steps short enough, memory takes half of them; at the free equilibrium all that is not
# settled is the control itself (benchmarks/controlled_phases.py)
BY_ENERGY = LeastControl(
    controller=EnergyInversion(
        gain=0.1, leak=1.0, solver=Anderson(tol=0.03, damping=0.3, history=10, max_steps=100)
    ),
    start="free",
)

# φ moves by b = 0.1 of the control, so that this is the tolerance of the others on the control
BY_LINEAR_FEEDBACK = LeastControl(
    controller=LinearFeedback(
        gain=0.1,
        leak=1.0,
        feedback="feedback",
        gate=Tanh(),
        solver=Anderson(tol=0.003, max_steps=60),
    ),
    start="free",
)


# of states whose norm is about 45, as those of 32 normalised channels of 8 x 8 are
AT_EASE = Anderson(tol=0.3, max_steps=20)


@dataclass(frozen=True)
class TrainingMethod:
    """How a network is trained by a method.

    Attributes:
        label: the method in words.
        estimator: of the gradient.
        solver: settles the neurons; what `LeastControl` does not use in training, the test does.
        outer_lr: Adam's step size.
        weight_decay: Adam's, decoupled; what aligns learned feedback with the weights.
        feedback: what carries the control back through a feed-forward network.
    """

    label: str
    estimator: Estimator
    solver: Solver
    outer_lr: float = 1e-3
    weight_decay: float = 0.0
    feedback: Feedback = "transposed"


@dataclass(frozen=True)
class Source:
    """Where images come from.

    Attributes:
        name: of the data set.
        files: the module of `equigrad.experiments.data` that has `load`, `TEST`, `SHAPE` and
            `CLASSES`.
        held_out: training images for validation, by default.
    """

    name: str
    files: ModuleType
    held_out: int


MNIST = Source("MNIST", mnist, held_out=10_000)
# a tenth of one of its five files, which is all that some folders have
CIFAR10 = Source("CIFAR-10", cifar10, held_out=1000)


@dataclass(frozen=True)
class ImageNetwork:
    """A network that tells images apart.

    Attributes:
        label: what it is, in words.
        hidden: widths of its hidden layers, or their numbers of channels.
        network: makes it of an image's shape, `hidden` and the number of classes; one that
            `Architecture` knows.
        methods: how it can be trained, the first by default.
        source: of its images.
        batch: images of a mini-batch, by default.
        epochs: at scale `small`, by default.
        paper_epochs: at scale `paper`.
    """

    label: str
    hidden: tuple[int, ...]
    network: Callable[..., Any]
    methods: Mapping[NetworkMethodName, TrainingMethod]
    source: Source = MNIST
    batch: int = 100
    epochs: float = 10
    paper_epochs: float = 30


def _under(controller: Controller) -> LeastControl:
    return LeastControl(controller=controller, start="params")


IMAGE_NETWORKS: dict[NetworkSettingName, ImageNetwork] = {
    "feed-forward": ImageNetwork(
        "feed-forward net",
        (256, 256),
        relaxing_tanh_network,
        {
            "exact": TrainingMethod("backpropagation", Adjoint(solver=SWEEPS), SWEEPS),
            "dynamic-inversion": TrainingMethod("dynamic inversion", _under(INVERSION), SWEEPS),
            "energy-inversion": TrainingMethod("energy-based inversion", BY_ENERGY, SWEEPS),
            "kolen-pollack": TrainingMethod(
                "dynamic inversion with learned feedback",
                BY_LEARNED_FEEDBACK,
                SWEEPS,
                # both receive the same steps, so that W and B align as these add up; decay, which
                # would see to the rest, costs accuracy: after two epochs 1.0 gives angles of 50°
                # for 57° and 96.3 % of the validation images for 96.6 %
                weight_decay=0.1,
                feedback="layerwise",
            ),
            "linear-feedback": TrainingMethod(
                "linear feedback, learned from noise",
                BY_LINEAR_FEEDBACK,
                SWEEPS,
                feedback="direct",
            ),
        },
    ),
    "recurrent": ImageNetwork(
        "equilibrium RNN",
        (256,),
        recurrent_tanh_network,
        {
            "exact": TrainingMethod("recurrent backpropagation", Adjoint(solver=REST), REST),
            "dynamic-inversion": TrainingMethod(
                # from rest, and more gently: otherwise some samples of a batch did not settle
                "dynamic inversion",
                LeastControl(controller=replace(INVERSION, gain=0.03), start="free"),
                REST,
            ),
            "energy-inversion": TrainingMethod(
                # as gently
                "energy-based inversion",
                replace(BY_ENERGY, controller=replace(BY_ENERGY.controller, gain=0.03)),
                REST,
            ),
        },
    ),
    "hopfield": ImageNetwork(
        "Hopfield network",
        (1024,),
        hopfield_network,
        {
            "equilibrium-propagation": TrainingMethod(
                "equilibrium propagation",
                replace(PAPERS_RULE, scheme="symmetric", nudged_solver=Picard(max_steps=5)),
                Picard(max_steps=10),
                outer_lr=5e-4,
            ),
            "exact": TrainingMethod(
                "recurrent backpropagation", Adjoint(solver=REST), REST, outer_lr=5e-4
            ),
        },
    ),
    "cifar-implicit": ImageNetwork(
        "convolutional implicit network",
        (32,),
        convolutional_equilibrium_network,
        {
            "exact": TrainingMethod(
                "recurrent backpropagation",
                Adjoint(solver=Anderson(tol=0.03, max_steps=15)),
                AT_EASE,
            ),
            "phantom-gradient": TrainingMethod(
                "phantom gradient", PhantomGradient(steps=4, damping=0.8), AT_EASE
            ),
            "dynamic-inversion": TrainingMethod(
                "dynamic inversion",
                LeastControl(controller=INVERSION, start="free"),
                AT_EASE,
            ),
        },
        source=CIFAR10,
        batch=50,
        epochs=5,
        paper_epochs=75,
    ),
    "cifar-hopfield": ImageNetwork(
        "convolutional Hopfield network",
        (16, 32),
        convolutional_hopfield_network,
        {
            "equilibrium-propagation": TrainingMethod(
                "equilibrium propagation",
                replace(
                    PAPERS_RULE, beta=0.5, scheme="symmetric", nudged_solver=Picard(max_steps=6)
                ),
                Picard(max_steps=16),
                outer_lr=2e-3,
            ),
        },
        source=CIFAR10,
        batch=50,
        epochs=5,
        paper_epochs=120,
    ),
}
