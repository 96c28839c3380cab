"""Networks whose neurons settle, trained on images by every estimator in one harness."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal, Self

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import Tanh

from equigrad.controllers import Controller, DynamicInversion, EnergyInversion, LinearFeedback
from equigrad.errors import ConfigurationError
from equigrad.estimators import Adjoint, Contrastive, Estimator, LeastControl, PhantomGradient
from equigrad.experiments.data import cifar10, mnist
from equigrad.experiments.data.images import split
from equigrad.experiments.runs.experiment import ScaleName, at_least, one_of
from equigrad.experiments.runs.formats import words
from equigrad.experiments.runs.model import Architecture, Model
from equigrad.experiments.runs.run_directory import RunDirectory
from equigrad.experiments.settling import network_training
from equigrad.experiments.settling.network_training import NetworkTraining
from equigrad.nn.settling_networks import (
    Feedback,
    convolutional_equilibrium_network,
    convolutional_hopfield_network,
    hopfield_network,
    recurrent_tanh_network,
    relaxing_tanh_network,
)
from equigrad.solvers import Anderson, Picard, Solver
from equigrad.training import pick_device, pick_dtype
from equigrad.training.relaxation import classify
from equigrad.training.split import Split
from equigrad.training.targets import Classes

SettingName = Literal["feed-forward", "recurrent", "hopfield", "cifar-implicit", "cifar-hopfield"]
MethodName = Literal[
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
class Recipe:
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
class Setting:
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
    methods: Mapping[MethodName, Recipe]
    source: Source = MNIST
    batch: int = 100
    epochs: float = 10
    paper_epochs: float = 30


def _under(controller: Controller) -> LeastControl:
    return LeastControl(controller=controller, start="params")


SETTINGS: dict[SettingName, Setting] = {
    "feed-forward": Setting(
        "feed-forward net",
        (256, 256),
        relaxing_tanh_network,
        {
            "exact": Recipe("backpropagation", Adjoint(solver=SWEEPS), SWEEPS),
            "dynamic-inversion": Recipe("dynamic inversion", _under(INVERSION), SWEEPS),
            "energy-inversion": Recipe("energy-based inversion", BY_ENERGY, SWEEPS),
            "kolen-pollack": Recipe(
                "dynamic inversion with learned feedback",
                BY_LEARNED_FEEDBACK,
                SWEEPS,
                # both receive the same steps, so that W and B align as these add up; decay, which
                # would see to the rest, costs accuracy: after two epochs 1.0 gives angles of 50°
                # for 57° and 96.3 % of the validation images for 96.6 %
                weight_decay=0.1,
                feedback="layerwise",
            ),
            "linear-feedback": Recipe(
                "linear feedback, learned from noise",
                BY_LINEAR_FEEDBACK,
                SWEEPS,
                feedback="direct",
            ),
        },
    ),
    "recurrent": Setting(
        "equilibrium RNN",
        (256,),
        recurrent_tanh_network,
        {
            "exact": Recipe("recurrent backpropagation", Adjoint(solver=REST), REST),
            "dynamic-inversion": Recipe(
                # from rest, and more gently: otherwise some samples of a batch did not settle
                "dynamic inversion",
                LeastControl(controller=replace(INVERSION, gain=0.03), start="free"),
                REST,
            ),
            "energy-inversion": Recipe(
                # as gently
                "energy-based inversion",
                replace(BY_ENERGY, controller=replace(BY_ENERGY.controller, gain=0.03)),
                REST,
            ),
        },
    ),
    "hopfield": Setting(
        "Hopfield network",
        (1024,),
        hopfield_network,
        {
            "equilibrium-propagation": Recipe(
                "equilibrium propagation",
                Contrastive(beta=0.1, scheme="symmetric", nudged_solver=Picard(max_steps=5)),
                Picard(max_steps=10),
                outer_lr=5e-4,
            ),
            "exact": Recipe("recurrent backpropagation", Adjoint(solver=REST), REST, outer_lr=5e-4),
        },
    ),
    "cifar-implicit": Setting(
        "convolutional implicit network",
        (32,),
        convolutional_equilibrium_network,
        {
            "exact": Recipe(
                "recurrent backpropagation",
                Adjoint(solver=Anderson(tol=0.03, max_steps=15)),
                AT_EASE,
            ),
            "phantom-gradient": Recipe(
                "phantom gradient", PhantomGradient(steps=4, damping=0.8), AT_EASE
            ),
            "dynamic-inversion": Recipe(
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
    "cifar-hopfield": Setting(
        "convolutional Hopfield network",
        (16, 32),
        convolutional_hopfield_network,
        {
            "equilibrium-propagation": Recipe(
                "equilibrium propagation",
                Contrastive(beta=0.5, scheme="symmetric", nudged_solver=Picard(max_steps=6)),
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


@dataclass(frozen=True, kw_only=True)
class Equilibrium(NetworkTraining):
    """Train a network whose neurons settle to tell images apart.

    A feed-forward net that is controlled, a recurrent one at rest, an energy-based one, on MNIST;
    a convolutional implicit network and an energy-based one on CIFAR-10: by least control,
    equilibrium propagation, or the exact gradient through the settled state. Some training images
    are held out and watch; nothing is chosen by the test.
    """

    score: ClassVar[str] = "accuracy"

    setting: SettingName = "feed-forward"
    """The network, and with it the images."""

    method: MethodName = "exact"
    """How its gradient is had."""

    scale: ScaleName = "small"
    """`smoke` presets a few steps on few images, to see that all works; `paper` many epochs."""

    seed: int = 0
    """Draws the network's start, the images held out and the order of the others."""

    hidden: tuple[int, ...]
    """Widths of the hidden layers, or their numbers of channels."""

    weight_decay: float = 0.0
    """Adam's weight decay, decoupled from the gradient."""

    samples: int | None = None
    """Images for training and validation together; None for all there are."""

    held_out: int
    """Of them, for validation."""

    test_images: int | None = None
    """The first so many images of the test; None for all there are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, "held_out", self.held_out)
        if not self.hidden or min(self.hidden) < 1:
            raise ConfigurationError(f"hidden widths must be at least 1, got {self.hidden}")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigurationError(f"weight_decay must be at least 0, got {self.weight_decay}")
        if self.test_images is not None:
            at_least(1, "test_images", self.test_images)
        with torch.device("meta"):  # which computes nothing: whether such widths make a network
            self.architecture().build()

    @classmethod
    def preset(cls, **chosen: str) -> Self:
        """The defaults that some words choose: `setting`, `method` and `scale`."""
        name = one_of(SETTINGS, "setting", chosen.get("setting", "feed-forward"))
        setting = SETTINGS[name]
        word = chosen.get("method", next(iter(setting.methods)))
        method = one_of(setting.methods, f"the method of setting {name!r}", word)
        recipe = setting.methods[method]
        small = cls(
            setting=name,
            method=method,
            hidden=setting.hidden,
            solver=recipe.solver,
            estimator=recipe.estimator,
            epochs=setting.epochs,
            batch=setting.batch,
            held_out=setting.source.held_out,
            outer_lr=recipe.outer_lr,
            weight_decay=recipe.weight_decay,
        )
        scale = chosen.get("scale", "small")
        if scale == "paper":
            return replace(small, scale="paper", epochs=setting.paper_epochs)
        if scale == "smoke":
            return replace(
                small,
                scale="smoke",
                hidden=tuple(min(width, 16) for width in setting.hidden),
                epochs=1,
                batch=50,
                samples=400,
                held_out=100,
                test_images=100,
            )
        return small

    @property
    def recipe(self) -> Recipe:
        """How the method trains the network."""
        known = SETTINGS[one_of(SETTINGS, "setting", self.setting)].methods
        return known[one_of(known, f"the method of setting {self.setting!r}", self.method)]

    @property
    def kind(self) -> type[Estimator]:
        """The method's estimator."""
        return type(self.recipe.estimator)

    @property
    def label(self) -> str:
        """Network and method, in words."""
        return f"{SETTINGS[self.setting].label}, {self.recipe.label}"

    def architecture(self) -> Architecture:
        """Of the network."""
        setting, recipe = SETTINGS[self.setting], self.recipe
        files = setting.source.files
        arguments = {"shape": files.SHAPE, "hidden": self.hidden, "outputs": len(files.CLASSES)}
        if recipe.feedback != "transposed":
            arguments["feedback"] = recipe.feedback
        return Architecture(setting.network.__name__, arguments)

    def load(self, device: torch.device, dtype: torch.dtype) -> Split:
        """The images, standardised."""
        files = SETTINGS[self.setting].source.files
        pool = files.load()
        total = len(pool) if self.samples is None else self.samples
        parts = split(
            pool,
            files.load(files.TEST),
            samples=total,
            training=total - self.held_out,
            seed=self.seed,
            device=device,
            dtype=dtype,
        )
        assert parts.test is not None
        first = slice(self.test_images)
        test = parts.test[0][first], parts.test[1][first]
        counts = [len(y) for _, y in (parts.train, parts.validation, test)]
        note = (
            f"{counts[0]:,} training, {counts[1]:,} validation and {counts[2]:,} test images of "
            f"{SETTINGS[self.setting].source.name}, the first two drawn from {len(pool):,}"
        )
        return replace(parts, test=test, target=Classes(files.CLASSES), note=note)


class Job(network_training.Job[Equilibrium, Any]):
    """An experiment's images and network.

    Attributes:
        data: the images.
    """

    def __init__(self, config: Equilibrium) -> None:
        device, dtype = pick_device(config.device), pick_dtype(config.dtype)
        self.data = config.load(device, dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            network = config.architecture().build()
        super().__init__(
            config, network.to(device, dtype), self.data.train, digest=self.data.digest
        )

    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW."""
        weights, config = self.network.parameters(), self.config
        return torch.optim.AdamW(weights, lr=config.outer_lr, weight_decay=config.weight_decay)

    def measured(self, *parts: str) -> dict[str, float]:
        """Per cent of images that the settled network is right about, by part."""
        known = {"training": self.data.train, **self.data.judges}
        return {f"{part}_accuracy": self.accuracy(known[part]) for part in parts}

    def accuracy(self, part: tuple[Tensor, Tensor]) -> float:
        """Per cent of images that the settled network is right about."""
        found = classify(self.network, part[0], solver=self.config.solver)
        return 100 * (found == part[1]).double().mean().item()

    def model(self) -> Mapping[str, Any]:
        """What `equigrad predict` asks."""
        config, data = self.config, self.data
        weights = dict(self.network.named_parameters())
        model = Model(config.architecture(), weights, data.target, data.encoding, config.solver)
        return model.plain()

    def finish(self, directory: RunDirectory, console: Console) -> Mapping[str, Any]:
        """Accuracies on validation and test."""
        metrics = self.measured("validation", "test")
        return {"setting": self.config.setting, "metrics": metrics}


def run(config: Equilibrium, out: Path, *, resume: bool, console: Console) -> dict[str, float]:
    """Train and test in `out`, and print what was reached.

    Returns:
        The metrics by name.
    """
    torch.set_num_threads(config.threads)
    job = Job(config)
    directory = RunDirectory(out, config, resume=resume)
    console.print(job.data.note, highlight=False, soft_wrap=True)
    metrics = job.learned(directory, resume=resume, console=console)
    table = Table(title=f"{config.label}, seed {config.seed}, scale {config.scale}")
    table.add_column("")
    table.add_column("reached", justify="right")
    for name, value in metrics.items():
        table.add_row(words(name), f"{value:.2f}")
    console.print(table)
    return metrics
