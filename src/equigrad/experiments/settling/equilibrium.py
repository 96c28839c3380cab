"""The equilibrium experiment: image classification by networks that settle."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import torch
from rich.console import Console
from torch import Tensor

from equigrad.estimators import Estimator
from equigrad.experiments.data.images import split
from equigrad.experiments.runs.experiment import ScaleName, one_of
from equigrad.experiments.runs.formats import as_rich, words
from equigrad.experiments.runs.model import Architecture, Model
from equigrad.experiments.runs.run_directory import RunDirectory
from equigrad.experiments.settling.image_networks import (
    IMAGE_NETWORKS,
    NetworkMethodName,
    NetworkSettingName,
    TrainingMethod,
)
from equigrad.experiments.settling.network_training import NetworkTrainer, NetworkTraining
from equigrad.fields import SOME, Count, CountFrom0, NotNegative
from equigrad.training import OuterState, pick_device, pick_dtype
from equigrad.training.relaxation import classify
from equigrad.training.split import Split
from equigrad.training.targets import Classes


@dataclass(frozen=True, kw_only=True)
class Equilibrium(NetworkTraining):
    """Train a network whose neurons settle to classify images.

    The networks are a controlled feed-forward network, a recurrent one and an energy-based one on
    MNIST, and a convolutional implicit network and an energy-based one on CIFAR-10. They learn by
    least control, by equilibrium propagation, or by the exact gradient through the settled state.
    Some training images are held out for validation; nothing is chosen by the test set.
    """

    score: ClassVar[str] = "accuracy"

    setting: NetworkSettingName = "feed-forward"
    """The network, which determines the images."""

    method: NetworkMethodName = "exact"
    """The estimator of the network's gradient."""

    scale: ScaleName = "small"
    """Preset of the length: `smoke` takes a few steps on few images; `paper` many epochs."""

    seed: CountFrom0 = 0
    """Seed of the initial weights, of the held-out images and of the order of the others."""

    hidden: Annotated[tuple[Count, ...], SOME]
    """Widths of the hidden layers, or their numbers of channels."""

    weight_decay: NotNegative = 0.0
    """Adam's weight decay, decoupled from the gradient."""

    samples: Count | None = None
    """Number of images for training and validation together; None for all."""

    held_out: Count
    """Number of these images for validation."""

    test_images: Count | None = None
    """Number of test images, the first of the set; None for all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        with torch.device("meta"):  # check that the widths make a network, at no cost
            self.architecture().build()

    @classmethod
    def preset(cls, **chosen: str) -> Self:
        """The defaults for `setting`, `method` and `scale`."""
        name = one_of(IMAGE_NETWORKS, "setting", chosen.get("setting", "feed-forward"))
        setting = IMAGE_NETWORKS[name]
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
    def recipe(self) -> TrainingMethod:
        """The settings with which the method trains the network."""
        known = IMAGE_NETWORKS[self.setting].methods
        return known[one_of(known, f"the method of setting {self.setting!r}", self.method)]

    @property
    def kind(self) -> type[Estimator]:
        """The estimator class of the method."""
        return type(self.recipe.estimator)

    @property
    def label(self) -> str:
        """Network and method, in words."""
        return f"{IMAGE_NETWORKS[self.setting].label}, {self.recipe.label}"

    def architecture(self) -> Architecture:
        """The architecture of the network."""
        setting, recipe = IMAGE_NETWORKS[self.setting], self.recipe
        files = setting.source.files
        arguments = {"shape": files.SHAPE, "hidden": self.hidden, "outputs": len(files.CLASSES)}
        if recipe.feedback != "transposed":
            arguments["feedback"] = recipe.feedback
        return Architecture(setting.network.__name__, arguments)

    def load(self, device: torch.device, dtype: torch.dtype) -> Split:
        """The images, standardised."""
        files = IMAGE_NETWORKS[self.setting].source.files
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
            f"{IMAGE_NETWORKS[self.setting].source.name}, the first two drawn from {len(pool):,}"
        )
        return replace(parts, test=test, target=Classes(files.CLASSES), note=note)


class ImageTrainer(NetworkTrainer[Equilibrium, Any]):
    """Trains a settling network to classify images, and tests it.

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
        """Percentage of images that the settled network classifies correctly, by part."""
        known = {"training": self.data.train, **self.data.judges}
        return {f"{part}_accuracy": self.accuracy(known[part]) for part in parts}

    def accuracy(self, part: tuple[Tensor, Tensor]) -> float:
        """Percentage of images that the settled network classifies correctly."""
        found = classify(self.network, part[0], solver=self.config.solver)
        return 100 * (found == part[1]).double().mean().item()

    def finish(self, state: OuterState, folder: Path, console: Console) -> dict[str, Any]:
        """Save the model for `equigrad predict`; return accuracies on validation and test sets."""
        config, data = self.config, self.data
        weights = dict(self.network.named_parameters())
        model = Model(config.architecture(), weights, data.target, data.encoding, config.solver)
        model.save(folder)
        metrics = self.measured("validation", "test")
        return {"setting": config.setting, "metrics": metrics, "epochs": self.epochs(state)}


def train_on_images(
    config: Equilibrium, out: Path, *, resume: bool, console: Console
) -> dict[str, float]:
    """Train and test in `out`, and print the results.

    Returns:
        The metrics by name.
    """
    torch.set_num_threads(config.threads)
    trainer = ImageTrainer(config)
    directory = RunDirectory(out, config, resume=resume)
    console.print(trainer.data.note, highlight=False, soft_wrap=True)
    metrics = trainer.learned(directory, resume=resume, console=console)
    title = f"{config.label}, seed {config.seed}, scale {config.scale}"
    rows = ([words(name), f"{value:.2f}"] for name, value in metrics.items())
    console.print(as_rich(title, ["reached"], rows))
    return metrics
