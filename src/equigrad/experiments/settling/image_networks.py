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

# b = gain / leak = 0.1, a tenth of the loss's own gradient: the paper's 10 left many samples of a
# batch unsettled once the weights had grown (docs/least-control.md)
INVERSION = DynamicInversion(gain=0.1, leak=1.0, solver=Anderson(tol=0.03, max_steps=30))

# starting at the free equilibrium, with enough steps for slow samples: all settled
BY_LEARNED_FEEDBACK = LeastControl(
    controller=replace(INVERSION, solver=Anderson(tol=0.03, max_steps=60)), start="free"
)

# the energy's curvature grows with the squares of the weights' norms, to 10 in ten epochs: damping
# makes steps short enough, and Anderson's history halves their number; at the free equilibrium the
# residual is the control itself (benchmarks/controlled_phases.py)
BY_ENERGY = LeastControl(
    controller=EnergyInversion(
        gain=0.1, leak=1.0, solver=Anderson(tol=0.03, damping=0.3, history=10, max_steps=100)
    ),
    start="free",
)

# φ moves by b = 0.1 times the control, so that this equals the others' tolerance on the control
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


# tolerance for states with a norm of about 45, that of 32 normalised channels of 8 x 8
AT_EASE = Anderson(tol=0.3, max_steps=20)


@dataclass(frozen=True)
class TrainingMethod:
    """The settings with which a method trains a network.

    Attributes:
        label: the method in words.
        estimator: the estimator of the gradient.
        solver: settles the neurons; `LeastControl` may not use it in training, but the test does.
        outer_lr: step size of Adam.
        weight_decay: weight decay of Adam, decoupled; it aligns learned feedback with the weights.
        feedback: the weights that carry the control back through a feed-forward network.
    """

    label: str
    estimator: Estimator
    solver: Solver
    outer_lr: float = 1e-3
    weight_decay: float = 0.0
    feedback: Feedback = "transposed"


@dataclass(frozen=True)
class Source:
    """A source of images.

    Attributes:
        name: name of the data set.
        files: the module of `equigrad.experiments.data` that has `load`, `TEST`, `SHAPE` and
            `CLASSES`.
        held_out: default number of training images for validation.
    """

    name: str
    files: ModuleType
    held_out: int


MNIST = Source("MNIST", mnist, held_out=10_000)
# a tenth of one of its five files, since some folders have only one
CIFAR10 = Source("CIFAR-10", cifar10, held_out=1000)


@dataclass(frozen=True)
class ImageNetwork:
    """A network that classifies images.

    Attributes:
        label: the network in words.
        hidden: widths of its hidden layers, or their numbers of channels.
        network: a function of an image's shape, `hidden` and the number of classes that makes the
            network; one that `Architecture` knows.
        methods: the methods that can train it, the default first.
        source: source of its images.
        batch: default number of images in a mini-batch.
        epochs: number of epochs at scale `small`.
        paper_epochs: number of epochs at scale `paper`.
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
                # W and B get the same steps, so that they align as these add up. Decay would align
                # them further, but costs accuracy: after two epochs, 1.0 gives angles of 50°
                # instead of 57°, and a validation accuracy of 96.3 % instead of 96.6 %
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
                # starting at zero, with weaker gains: otherwise some samples did not settle
                "dynamic inversion",
                LeastControl(controller=replace(INVERSION, gain=0.03), start="free"),
                REST,
            ),
            "energy-inversion": TrainingMethod(
                # the same weak gains
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
