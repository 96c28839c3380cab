"""The MNIST and CIFAR-10 experiments of Table 1: a strength for every weight, few images.

The hyperparameters of scale `paper` are the best found of Tables S1 to S4, in bold there.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch.nn import Flatten, Module, Sequential

from equigrad.estimators import T1T2, Contrastive
from equigrad.experiments.data import cifar10, mnist
from equigrad.experiments.data.images import Images, split
from equigrad.experiments.runs.methods import PAPERS_RULE
from equigrad.experiments.strengths.strength_learning import (
    EstimatorName,
    Published,
    StrengthExperiment,
)
from equigrad.fields import Checked, Count, Positive, require
from equigrad.nn import ReferenceStatistics, lenet5, tanh_network
from equigrad.solvers import GradientDescent
from equigrad.training.split import Split
from equigrad.training.strengths import Recipe, with_nudged


def nesterov(lr: float, steps: int) -> GradientDescent:
    """Gradient descent with the settings that all of the paper's networks are trained with."""
    return GradientDescent(lr=lr, momentum=0.9, nesterov=True, max_steps=steps)


@dataclass(frozen=True, kw_only=True)
class ByContrast(Checked):
    """How the contrastive rule learns strengths."""

    rule: Contrastive
    """The contrastive rule; its nudged phases use the free phase's solver, but their own length."""

    solver: GradientDescent
    """How the network is trained (the free phase), from the same start each time."""

    nudged_steps: Count
    """Number of steps of each nudged phase."""

    outer_lr: Positive
    """Adam's step size on the strengths."""

    def recipe(self) -> Recipe:
        """The contrastive rule with its nudged solver."""
        rule = with_nudged(self.rule, self.solver, self.nudged_steps)
        return Recipe(rule, self.solver, self.outer_lr)


@dataclass(frozen=True, kw_only=True)
class ByT1T2(Checked):
    """How T1–T2 learns strengths."""

    solver: GradientDescent
    """How the network is trained, from the same start each time."""

    outer_lr: Positive
    """Adam's step size on the strengths."""

    def recipe(self) -> Recipe:
        """T1–T2 with its solver."""
        return Recipe(T1T2(), self.solver, self.outer_lr)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The settings of a row of Table 1.

    Attributes:
        samples: images for training and validation together.
        training: of them, for training.
        batch: images of a mini-batch.
        contrastive: the best hyperparameters of Appendix F for the contrastive rule.
        t1t2: those for T1–T2.
        force_beta: β where nudged phases feel the constant force of the validation loss: of six,
            the one whose gradient is nearest to that of the loss at β = 0.1, by the validation
            images of seed 100 (`benchmarks/force_nudge.py`); the published one for mnist-30000,
            which was not compared.
        published: accuracies of the table.
        small: what scale `small` changes.
    """

    samples: int
    training: int
    batch: int | None = None
    contrastive: ByContrast
    t1t2: ByT1T2
    force_beta: float
    published: Mapping[str, Published]
    small: Mapping[str, Any]


def contrast(
    beta: float,
    lr: float,
    steps: int,
    nudged_steps: int,
    outer_lr: float,
    *,
    matched: bool = False,
) -> ByContrast:
    """Hyperparameters of the contrastive rule as in Tables S1 to S4, without matched phases."""
    return ByContrast(
        rule=replace(PAPERS_RULE, beta=beta, matched=matched),
        solver=nesterov(lr, steps),
        nudged_steps=nudged_steps,
        outer_lr=outer_lr,
    )


def t1t2(lr: float, steps: int, outer_lr: float) -> ByT1T2:
    """Hyperparameters of T1–T2, as in Tables S1 to S4."""
    return ByT1T2(solver=nesterov(lr, steps), outer_lr=outer_lr)


SETTINGS: dict[str, Setting] = {
    "mnist-30000": Setting(
        samples=60000,
        training=30000,
        batch=500,
        contrastive=contrast(1.0, 0.01, 2000, 200, 0.001),
        t1t2=t1t2(0.01, 2000, 0.0001),
        force_beta=1.0,
        published={
            "contrastive": Published((99.75, 0.06), (98.04, 0.04)),
            "t1t2": Published((98.64, 0.05), (97.57, 0.03)),
        },
        small={
            "outer_steps": 20,
            "contrastive": contrast(1.0, 0.03, 600, 60, 0.001, matched=True),
            "t1t2": t1t2(0.03, 600, 0.0003),
        },
    ),
    "mnist-1": Setting(
        samples=10000,
        training=1,
        contrastive=contrast(3.0, 0.00865, 1000, 50, 0.0031),
        t1t2=t1t2(0.00027, 200, 0.049693),
        force_beta=0.03,
        published={
            "contrastive": Published((93.50, 0.63), (89.49, 0.55)),
            "t1t2": Published((87.77, 0.66), (85.89, 0.55)),
        },
        small={
            "validation_batch": 500,
            "contrastive": contrast(3.0, 0.00865, 1000, 50, 0.0031, matched=True),
        },
    ),
    "mnist-10": Setting(
        samples=10000,
        training=10,
        contrastive=contrast(3.0, 0.003, 2000, 100, 0.001),
        t1t2=t1t2(0.0001, 2000, 0.03),
        force_beta=0.1,
        published={
            "contrastive": Published((96.19, 0.32), (91.52, 0.28)),
            "t1t2": Published((89.84, 2.62), (87.19, 2.49)),
        },
        small={
            "outer_steps": 50,
            "validation_batch": 500,
            "contrastive": contrast(3.0, 0.003, 2000, 100, 0.003, matched=True),
            "t1t2": t1t2(0.0001, 2000, 0.06),
        },
    ),
    "cifar-50": Setting(
        samples=1000,
        training=50,
        contrastive=contrast(3.0, 0.001, 2000, 20, 0.001),
        t1t2=t1t2(0.001, 2000, 0.001),
        force_beta=0.3,
        published={
            "contrastive": Published((99.77, 0.13), (31.68, 0.26)),
            "t1t2": Published((62.97, 3.73), (28.69, 0.85)),
        },
        small={
            "outer_steps": 30,
            "validation_batch": 475,
            "contrastive": contrast(3.0, 0.004, 500, 20, 0.01, matched=True),
            "t1t2": t1t2(0.004, 500, 0.003),
        },
    ),
}


@dataclass(frozen=True, kw_only=True)
class OnImages(StrengthExperiment):
    """An experiment for a row of Table 1, made by `preset`.

    Attributes:
        settings: the lines there are, the default one first.
        source: the name of the data set and its number of training images.
    """

    settings: ClassVar[tuple[str, ...]]
    source: ClassVar[tuple[str, int]]

    setting: str
    """The row of Table 1 that presets the settings below."""

    samples: Count
    """Number of images for training and validation together, drawn from the training images."""

    training: Count
    """Number of these in the training set; the others are the validation set."""

    batch: Count | None
    """Size of a training mini-batch; None to use all images at once."""

    validation_batch: Count | None
    """Size of a validation mini-batch, one for each nudged step; None to use all images at once."""

    contrastive: ByContrast
    """How the contrastive rule learns strengths."""

    t1t2: ByT1T2
    """How T1–T2 learns strengths."""

    @classmethod
    def _preset(cls, **chosen: str) -> Self:
        """The default settings of a row and a scale."""
        name = chosen.get("setting", "")
        name = name if name in cls.settings else cls.settings[0]
        setting = SETTINGS[name]
        paper = cls(
            setting=name,
            scale="paper",
            samples=setting.samples,
            training=setting.training,
            batch=setting.batch,
            validation_batch=setting.batch,
            contrastive=setting.contrastive,
            t1t2=setting.t1t2,
        )
        scale = chosen.get("scale", "small")
        if scale == "paper":
            return paper
        if scale == "smoke":
            return paper._smoke()
        return replace(paper, scale="small", **setting.small)

    def _smoke(self) -> Self:
        """Settings for a few short steps on few images, for a quick check that everything works."""

        def hurried(solver: GradientDescent) -> GradientDescent:
            return replace(solver, max_steps=10)

        contrastive, t1t2 = self.contrastive, self.t1t2
        return replace(
            self,
            scale="smoke",
            outer_steps=2,
            samples=200,
            training=min(self.training, 100),
            batch=self.batch and 50,
            validation_batch=50,
            contrastive=replace(contrastive, solver=hurried(contrastive.solver), nudged_steps=3),
            t1t2=replace(t1t2, solver=hurried(t1t2.solver)),
        )

    @property
    def name(self) -> str:
        """The row of Table 1."""
        return self.setting

    def load(self, device: torch.device, dtype: torch.dtype) -> Split:
        """Images drawn by the seed and standardised, with a note on where they come from."""
        pool, test = self.images()
        parts = split(
            pool,
            test,
            samples=self.samples,
            training=self.training,
            seed=self.seed,
            device=device,
            dtype=dtype,
        )
        counts = [len(labels) for _, labels in (parts.train, *parts.judges.values())]
        name, there = self.source
        of = f"the {there:,}" if len(pool) == there else f"{len(pool):,} of the {there:,}"
        note = (
            f"{counts[0]:,} training and {counts[1]:,} validation images, drawn from {of} "
            f"training images of {name}; {counts[2]:,} test images"
        )
        if self.validation_batch is not None and self.validation_batch < counts[1]:
            note += f"; a nudged step sees {self.validation_batch:,} of the validation images"
        return replace(parts, note=note)

    @abstractmethod
    def images(self) -> tuple[Images, Images]:
        """Training and test images."""

    def batch_sizes(self) -> tuple[int | None, int | None]:
        """Size of a mini-batch for training and for validation; None to use all images at once."""
        return self.batch, self.validation_batch

    def recipe(self, name: EstimatorName) -> Recipe:
        """The paper's two methods have their own settings; others use the contrastive rule's."""
        if name == "t1t2":
            return self.t1t2.recipe()
        recipe = self.contrastive.recipe()
        return recipe if name == "contrastive" else replace(recipe, estimator=self.another(name))

    def published(self, name: str) -> Published | None:
        """The numbers of Table 1, unless the number of images was changed."""
        setting = SETTINGS[self.setting]
        same = (self.samples, self.training) == (setting.samples, setting.training)
        return setting.published.get(name) if same else None


@dataclass(frozen=True, kw_only=True)
class Mnist(OnImages):
    """Learn a strength for every weight of a tanh network that sees 1, 10 or 30,000 MNIST digits.

    The strengths of its 466,698 weights and biases follow the hypergradient of the validation loss.
    Beside it: no regularisation, the best of 13 single strengths, the other estimator, and the
    numbers of the paper's Table 1.
    """

    settings: ClassVar[tuple[str, ...]] = ("mnist-10", "mnist-1", "mnist-30000")
    source: ClassVar[tuple[str, int]] = ("MNIST", 60_000)

    setting: Literal["mnist-10", "mnist-1", "mnist-30000"]
    """The row of Table 1 that presets the settings below, named by its training images."""

    hidden: tuple[Count, ...] = (256,) * 5
    """Widths of the hidden layers."""

    def images(self) -> tuple[Images, Images]:
        """Training and test images."""
        return mnist.load(), mnist.load(mnist.TEST)

    def network(self, split: Split) -> Module:
        """A network with 784 inputs, tanh layers and 10 outputs."""
        return Sequential(Flatten(), *tanh_network(28 * 28, self.hidden, 10))


@dataclass(frozen=True, kw_only=True)
class Cifar10(OnImages):
    """Learn a strength for every weight of a LeNet-5 that sees 50 photographs of CIFAR-10.

    Batch normalisation takes the statistics of the training images, in every phase and when
    accuracy is measured. Beside it: no regularisation, the best of 13 single strengths, the other
    estimator, and the numbers of the paper's Table 1.
    """

    settings: ClassVar[tuple[str, ...]] = ("cifar-50",)
    source: ClassVar[tuple[str, int]] = ("CIFAR-10", 50_000)

    setting: Literal["cifar-50"]
    """The row of Table 1 that presets the settings below, named by its training images."""

    constant_statistics: bool = False
    """Hold batch normalisation's statistics fixed in outer gradients, as `eval` mode does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not self.constant_statistics or self.batch is None,
            f"constant_statistics would hold those of mini-batches fixed where the network "
            f"learns, too; leave out batch={self.batch}",
        )

    def images(self) -> tuple[Images, Images]:
        """Training images, of as many batches as there are files, and test images."""
        return cifar10.load(), cifar10.load(cifar10.TEST)

    def network(self, split: Split) -> Module:
        """LeNet-5 with batch normalisation and ReLUs."""
        constant = self.constant_statistics
        return ReferenceStatistics(lenet5(), split.train[0], constant=constant)
