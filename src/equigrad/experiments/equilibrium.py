"""Networks whose neurons settle, trained on images by every estimator in one harness."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import Flatten, Linear, Module, Sequential, Tanh

import equigrad
from equigrad.controllers import Controller, DynamicInversion, EnergyInversion, LinearFeedback
from equigrad.data import mnist
from equigrad.data.images import split
from equigrad.data.split import Split
from equigrad.errors import ConfigurationError
from equigrad.estimators import Adjoint, Contrastive, Estimator, LeastControl
from equigrad.experiments import figures
from equigrad.experiments.few_shot_figures import learning_curves
from equigrad.experiments.formats import words
from equigrad.experiments.run_directory import RunDirectory, describe, versions
from equigrad.experiments.strength_learning import ScaleName, at_least, positive
from equigrad.experiments.watching import watching
from equigrad.nn import EquilibriumRNN, Hopfield, Relaxing, tanh_network, with_learned_feedback
from equigrad.solvers import Anderson, Picard, Solver
from equigrad.training import (
    Callback,
    OuterState,
    pick_device,
    pick_dtype,
)
from equigrad.training.device import DeviceName, DtypeName
from equigrad.training.files import as_bytes, write_whole
from equigrad.training.relaxation import classify, train_network

FORMAT = "equigrad settling network 1"

SettingName = Literal["feed-forward", "recurrent", "hopfield"]
MethodName = Literal[
    "exact",
    "dynamic-inversion",
    "energy-inversion",
    "kolen-pollack",
    "linear-feedback",
    "equilibrium-propagation",
]
PIXELS, CLASSES = 28 * 28, 10

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


@dataclass(frozen=True)
class Recipe:
    """How a network is trained by a method.

    Attributes:
        label: the method in words.
        estimator: of the gradient.
        solver: settles the neurons; what `LeastControl` does not use in training, the test does.
        outer_lr: Adam's step size.
        weight_decay: Adam's, decoupled; what aligns learned feedback with the weights.
        network: makes the network of its layers, where it has layers.
    """

    label: str
    estimator: Estimator
    solver: Solver
    outer_lr: float = 1e-3
    weight_decay: float = 0.0
    network: Callable[[Sequential], Relaxing] = Relaxing


@dataclass(frozen=True)
class Setting:
    """A network that tells digits apart.

    Attributes:
        label: what it is, in words.
        hidden: widths of its hidden layers.
        build: makes the network, a module, with a start that torch's generator draws.
        methods: how it can be trained, the first by default.
    """

    label: str
    hidden: tuple[int, ...]
    build: Callable[["Equilibrium"], Any]
    methods: Mapping[MethodName, Recipe]


def _feed_forward(config: "Equilibrium") -> Module:
    layers = Sequential(Flatten(), *tanh_network(PIXELS, config.hidden, CLASSES))
    return recipe_of(config.setting, config.method).network(layers)


def _with_learned_feedback(layers: Sequential) -> Relaxing:
    return Relaxing(Sequential(*with_learned_feedback(layers).children()))


def _with_linear_feedback(layers: Sequential) -> Relaxing:
    """Feedback weights from the outputs to every hidden layer, which know nothing at first."""
    *hidden, outputs = (layer.out_features for layer in layers if isinstance(layer, Linear))
    start = {str(i): torch.zeros(width, outputs) for i, width in enumerate(hidden)}
    return Relaxing(layers, feedback=start)


def _recurrent(config: "Equilibrium") -> Module:
    (width,) = config.hidden
    return EquilibriumRNN(PIXELS, width, CLASSES)


def _hopfield(config: "Equilibrium") -> Module:
    first, *others = (Linear(*sizes) for sizes in pairwise([PIXELS, *config.hidden, CLASSES]))
    return Hopfield([Sequential(Flatten(), first), *others])


def _under(controller: Controller) -> LeastControl:
    return LeastControl(controller=controller, start="params")


SETTINGS: dict[SettingName, Setting] = {
    "feed-forward": Setting(
        "feed-forward net",
        (256, 256),
        _feed_forward,
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
                network=_with_learned_feedback,
            ),
            "linear-feedback": Recipe(
                "linear feedback, learned from noise",
                BY_LINEAR_FEEDBACK,
                SWEEPS,
                network=_with_linear_feedback,
            ),
        },
    ),
    "recurrent": Setting(
        "equilibrium RNN",
        (256,),
        _recurrent,
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
        _hopfield,
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
}


@dataclass(frozen=True, kw_only=True)
class Equilibrium:
    """Train a network whose neurons settle to tell images apart.

    A feed-forward net that is controlled, a recurrent one at rest, an energy-based one: by least
    control, equilibrium propagation, or the exact gradient through the settled state. 10,000
    training images are held out and watch; nothing is chosen by the test.
    """

    setting: SettingName = "feed-forward"
    """The network."""

    method: MethodName = "exact"
    """How its gradient is had."""

    scale: ScaleName = "small"
    """`smoke` presets a few steps on few images, to see that all works; `paper` many epochs."""

    seed: int = 0
    """Draws the network's start, the images held out and the order of the others."""

    hidden: tuple[int, ...]
    """Widths of the hidden layers."""

    solver: Solver
    """How neurons settle."""

    estimator: Estimator
    """Of the gradient; the method presets which, and these are its knobs."""

    epochs: float
    """Passes over the training images."""

    minutes: float | None = None
    """End training after so long, instead of after so many epochs; validation included."""

    batch: int = 100
    """Images of a mini-batch."""

    outer_lr: float = 1e-3
    """Adam's step size."""

    decay: bool = True
    """Let it fall linearly, to zero at the end."""

    weight_decay: float = 0.0
    """Adam's weight decay, decoupled from the gradient."""

    clip: float | None = None
    """Scale gradients down to this norm where theirs is larger."""

    samples: int | None = None
    """Images for training and validation together; None for all there are."""

    held_out: int = 10_000
    """Of them, for validation."""

    test_images: int | None = None
    """The first so many images of the test; None for all there are."""

    checkpoint_every: int = 200
    """Steps between two checkpoints."""

    device: DeviceName = "auto"
    """Where to compute; `auto` takes CUDA where there is any."""

    dtype: DtypeName = "float32"
    """Floating-point type."""

    threads: int = 2
    """CPU threads."""

    def __post_init__(self) -> None:
        for name in ("batch", "held_out", "checkpoint_every", "threads"):
            at_least(1, name, getattr(self, name))
        at_least(0, "seed", self.seed)
        positive("outer_lr", self.outer_lr)
        positive("epochs", self.epochs)
        if not self.hidden or min(self.hidden) < 1:
            raise ConfigurationError(f"hidden widths must be at least 1, got {self.hidden}")
        if self.setting == "recurrent" and len(self.hidden) != 1:
            raise ConfigurationError(
                f"the recurrent network has one hidden layer, got hidden widths {self.hidden}"
            )
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigurationError(f"weight_decay must be at least 0, got {self.weight_decay}")
        for name in ("minutes", "clip"):
            if (value := getattr(self, name)) is not None:
                positive(name, value)
        if self.test_images is not None:
            at_least(1, "test_images", self.test_images)
        recipe = recipe_of(self.setting, self.method)
        if type(self.estimator) is not type(recipe.estimator):
            raise ConfigurationError(
                f"method {self.method!r} has the estimator {type(recipe.estimator).__name__}, got "
                f"{type(self.estimator).__name__}; Equilibrium.preset(method={self.method!r}) has "
                f"the right one"
            )

    @classmethod
    def preset(cls, **chosen: str) -> Self:
        """The defaults that some words choose: `setting`, `method` and `scale`."""
        name = setting_named(chosen.get("setting", "feed-forward"))
        setting = SETTINGS[name]
        method = method_named(name, chosen.get("method", next(iter(setting.methods))))
        recipe = setting.methods[method]
        small = cls(
            setting=name,
            method=method,
            hidden=setting.hidden,
            solver=recipe.solver,
            estimator=recipe.estimator,
            epochs=10,
            outer_lr=recipe.outer_lr,
            weight_decay=recipe.weight_decay,
        )
        scale = chosen.get("scale", "small")
        if scale == "paper":
            return replace(small, scale="paper", epochs=30)
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
    def label(self) -> str:
        """Network and method, in words."""
        setting = SETTINGS[self.setting]
        return f"{setting.label}, {setting.methods[self.method].label}"

    def load(self, device: torch.device, dtype: torch.dtype) -> Split:
        """The images, standardised."""
        pool = mnist.load()
        total = len(pool) if self.samples is None else self.samples
        parts = split(
            pool,
            mnist.load(mnist.TEST),
            samples=total,
            training=total - self.held_out,
            seed=self.seed,
            device=device,
            dtype=dtype,
        )
        assert parts.test is not None
        first = slice(self.test_images)
        return replace(parts, test=(parts.test[0][first], parts.test[1][first]))


def recipe_of(setting: SettingName, method: MethodName) -> Recipe:
    """How a network is trained by a method.

    Raises:
        ConfigurationError: it is not.
    """
    known = SETTINGS[setting].methods
    if method not in known:
        raise ConfigurationError(
            f"setting {setting!r} is trained by {', '.join(known)}, got method {method!r}"
        )
    return known[method]


def setting_named(word: str) -> SettingName:
    """The setting of that name.

    Raises:
        ConfigurationError: there is none.
    """
    for name in SETTINGS:
        if name == word:
            return name
    raise ConfigurationError(f"setting must be one of {', '.join(SETTINGS)}, got {word!r}")


def method_named(setting: SettingName, word: str) -> MethodName:
    """The method of that name, for a setting.

    Raises:
        ConfigurationError: there is none.
    """
    for name in SETTINGS[setting].methods:
        if name == word:
            return name
    known = ", ".join(SETTINGS[setting].methods)
    raise ConfigurationError(f"setting {setting!r} is trained by {known}, got method {word!r}")


class Job:
    """An experiment's images and network.

    Args:
        config: of the experiment.

    Attributes:
        config: likewise.
        data: the images.
        network: as drawn, until it learns.
    """

    def __init__(self, config: Equilibrium) -> None:
        device, dtype = pick_device(config.device), pick_dtype(config.dtype)
        self.config = config
        self.data = config.load(device, dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            network = SETTINGS[config.setting].build(config)
        self.network = network.to(device, dtype)

    def learn(self, callbacks: Sequence[Callback] = ()) -> OuterState:
        """Train the network in place."""
        config = self.config
        weights = [w for _, w in self.network.named_parameters()]
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            return train_network(
                self.network,
                self.data.train,
                solver=config.solver,
                estimator=config.estimator,
                optimizer=torch.optim.AdamW(
                    weights, lr=config.outer_lr, weight_decay=config.weight_decay
                ),
                epochs=config.epochs if config.minutes is None else math.inf,
                limit=math.inf if config.minutes is None else 60 * config.minutes,
                batch_size=config.batch,
                seed=config.seed,
                clip=config.clip,
                validate=lambda: {"validation_accuracy": self.accuracy(self.data.validation)},
                callbacks=callbacks,
            )

    def accuracy(self, part: tuple[Tensor, Tensor]) -> float:
        """Per cent of images that the settled network is right about."""
        found = classify(self.network, part[0], solver=self.config.solver)
        return 100 * (found == part[1]).double().mean().item()

    def learned(
        self, directory: RunDirectory, *, resume: bool, console: Console
    ) -> dict[str, float]:
        """Train and test, and leave the run in its directory."""
        if (ended := directory.result) is not None:
            return ended["metrics"]
        config = self.config
        state = self.learn(
            watching(
                directory,
                config.label,
                every=config.checkpoint_every,
                resume=resume,
                console=console,
                decay=config.outer_lr if config.decay else None,
            )
        )
        content = {
            "format": FORMAT,
            "equigrad": equigrad.__version__,
            "config": describe(config),
            "weights": {name: w.detach() for name, w in state.meta_params.items()},
        }
        write_whole(directory.path / "model.pt", as_bytes(content))
        assert self.data.test is not None
        metrics = {
            "validation_accuracy": self.accuracy(self.data.validation),
            "test_accuracy": self.accuracy(self.data.test),
        }
        figures.save(learning_curves(state.history, "accuracy"), directory.path / "learning.png")
        directory.write_json(
            "result.json",
            {
                "experiment": type(config).__name__.lower(),
                "estimator": type(config.estimator).__name__,
                "setting": config.setting,
                "method": config.method,
                "seed": config.seed,
                "scale": config.scale,
                "metrics": metrics,
                "paper": None,
                "epochs": state.step * config.batch / len(self.data.train[1]),
                "outer_steps": state.step,
                "gradient_evaluations": state.gradient_evaluations,
                "seconds": state.seconds,
                "device": str(pick_device(config.device)),
                "versions": versions(),
            },
        )
        return metrics


def run(config: Equilibrium, out: Path, *, resume: bool, console: Console) -> dict[str, float]:
    """Train and test in `out`, and print what was reached.

    Returns:
        The metrics by name.
    """
    torch.set_num_threads(config.threads)
    job = Job(config)
    directory = RunDirectory(out, config, resume=resume)
    counts = [len(y) for _, y in (job.data.train, job.data.validation, job.data.test or ((), ()))]
    console.print(
        f"{counts[0]:,} training, {counts[1]:,} validation and {counts[2]:,} test images",
        highlight=False,
    )
    metrics = job.learned(directory, resume=resume, console=console)
    table = Table(title=f"{config.label}, seed {config.seed}, scale {config.scale}")
    table.add_column("")
    table.add_column("reached", justify="right")
    for name, value in metrics.items():
        table.add_row(words(name), f"{value:.2f}")
    console.print(table)
    return metrics
