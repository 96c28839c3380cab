"""A picture as a network at rest, from place to colour: an implicit neural representation."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

import equigrad
from equigrad.controllers import DynamicInversion
from equigrad.errors import ConfigurationError
from equigrad.estimators import Adjoint, Estimator, LeastControl
from equigrad.experiments.data.picture import Picture, places, psnr, read_picture
from equigrad.experiments.runs import figures
from equigrad.experiments.runs.config_file import overlay
from equigrad.experiments.runs.experiment import ScaleName, at_least, one_of, positive
from equigrad.experiments.runs.formats import words
from equigrad.experiments.runs.model import reading
from equigrad.experiments.runs.run_directory import RunDirectory, describe
from equigrad.experiments.settling import network_training
from equigrad.experiments.settling.network_training import NetworkTraining
from equigrad.nn import EquilibriumRNN, FourierFeatures
from equigrad.nn.batches import summed_squares
from equigrad.solvers import Anderson, Solver
from equigrad.training import pick_device, pick_dtype
from equigrad.training.relaxation import settled_logits

FORMAT = "equigrad representation 1"

MethodName = Literal["exact", "dynamic-inversion"]

REST = Anderson(tol=1e-3, max_steps=60)

METHODS: dict[MethodName, tuple[str, Estimator]] = {
    "exact": ("recurrent backpropagation", Adjoint(solver=REST)),
    "dynamic-inversion": (
        "least control, dynamic inversion",
        # Picard's iteration, which a network that rests may well settle by, leaves learner and
        # controller together unsettled as the weights grow: docs/representation.md
        LeastControl(
            controller=DynamicInversion(
                gain=0.0, proportional=0.1, solver=Anderson(tol=3e-3, max_steps=60)
            ),
            start="params",
        ),
    ),
}
"""How the network can be trained: in words, and the estimator of its gradient."""

HELD_OUT = 0
"""Draws which pixels are for validation: the same for all runs."""


@dataclass(frozen=True, kw_only=True)
class Representation(NetworkTraining):
    """Learn a picture, from place to colour, by a recurrent network at rest.

    The network is shown the Fourier features of a place until it rests, and then says the colour
    there. It learns from the pixels of a grid, every other one of every other row by default, by
    the exact gradient and by least control, and is judged by those between them (PSNR).
    """

    score: ClassVar[str] = "psnr"

    method: MethodName = "exact"
    """How the gradient is had; the other one runs too, with `compare`."""

    compare: bool = True
    """Run the other method too, from the same start."""

    scale: ScaleName = "small"
    """`smoke` presets a few steps on few pixels, to see that all works; `paper` a large picture."""

    seed: int = 0
    """Draws the network's start, its Fourier features and the order of the pixels."""

    image: Path | None = None
    """The middle square of a picture of your own; of a photograph of scikit-learn's by default."""

    side: int = 128
    """Height and width that it is made to have, in pixels."""

    stride: int = 2
    """From pixel to pixel of the grid that is learned from; 1 learns all, and tests nothing."""

    held_out: int = 1000
    """Of the other pixels, for validation; the rest is for the test."""

    features: int = 128
    """Frequencies that the network is told of a place in; a sine and a cosine of each."""

    frequency: float = 6.0
    """Their standard deviation, in cycles over the picture."""

    hidden: int = 128
    """Neurons."""

    solver: Solver = REST
    """How neurons settle, in training and, whatever the method, in validation and test."""

    epochs: float = 40
    """Passes over the pixels that are learned from."""

    batch: int = 256
    """Pixels of a mini-batch."""

    outer_lr: float = 5e-3
    """Adam's step size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("side", "stride", "features", "hidden", "held_out"):
            at_least(1, name, getattr(self, name))
        positive("frequency", self.frequency)
        learned = len(range(0, self.side, self.stride)) ** 2
        if self.batch > learned:
            raise ConfigurationError(
                f"batch must be at most the number of pixels that are learned from, {learned}, got "
                f"{self.batch}; lower it, or the stride"
            )
        between = self.side**2 - learned
        if self.stride > 1 and self.held_out >= between:
            raise ConfigurationError(
                f"held_out must leave some of the {between} pixels that are not learned from for "
                f"the test, got {self.held_out}; lower it, or take a larger side"
            )

    @classmethod
    def preset(cls, **chosen: str) -> Self:
        """The defaults that some words choose: `method` and `scale`."""
        method = one_of(METHODS, "method", chosen.get("method", "exact"))
        small = cls(method=method, estimator=METHODS[method][1])
        scale = chosen.get("scale", "small")
        if scale == "paper":  # as large as the photograph allows; the paper's own is not published
            return replace(
                small, scale="paper", side=426, hidden=256, features=256, frequency=10.0, batch=1024
            )
        if scale == "smoke":
            return replace(
                small,
                scale="smoke",
                side=16,
                held_out=50,
                features=8,
                hidden=16,
                batch=32,
                epochs=2,
                frequency=1.0,
            )
        return small

    def of(self, method: MethodName) -> Self:
        """A run beside this one: the same but for the method."""
        return replace(self, compare=False, method=method, estimator=METHODS[method][1])

    @property
    def kind(self) -> type[Estimator]:
        """The method's estimator."""
        return type(METHODS[one_of(METHODS, "method", self.method)][1])

    @property
    def label(self) -> str:
        """The method, in words."""
        return METHODS[self.method][0]


@dataclass(frozen=True)
class Painter:
    """The colours that a network says of places.

    Attributes:
        encode: what it is told of a place.
        network: settles, and says its colour.
        solver: settles it.
    """

    encode: FourierFeatures
    network: EquilibriumRNN
    solver: Solver

    @classmethod
    def new(cls, config: Representation) -> Self:
        """As it is before it learns."""
        device, dtype = pick_device(config.device), pick_dtype(config.dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            encode = FourierFeatures(2, config.features, config.frequency)
            network = EquilibriumRNN(
                2 * config.features, config.hidden, 3, outer_loss=summed_squares
            )
        return cls(encode.to(device, dtype), network.to(device, dtype), config.solver)

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """What a run has left in `model.pt`, on the CPU.

        Args:
            folder: of the run, or the file itself.

        Raises:
            RunError: there is none, or it is damaged. Nothing of it is executed.
        """
        saved = "a run saves it at its end"
        with reading(folder, "a representation", FORMAT, saved) as loaded:
            written = loaded["config"]
            preset = Representation.preset(method=written["method"], scale=written["scale"])
            painter = cls.new(replace(overlay(preset, written), device="cpu"))
            painter.network.load_state_dict(loaded["network"])
            painter.encode.load_state_dict(loaded["encode"])
            return painter

    def colors(self, at: Tensor) -> tuple[Tensor, list[int]]:
        """Of places (n x 2, from -1 to 1): n x 3; and those for which it has not settled."""
        weights = next(self.network.parameters())
        return settled_logits(self.network, self.encode(at.to(weights)), solver=self.solver)

    def paint(self, side: int) -> Tensor:
        """The picture at any resolution, side x side x 3, from 0 to 1."""
        found, _ = self.colors(places(side))
        return found.view(side, side, 3).clamp(0, 1).cpu()


class Job(network_training.Job[Representation, EquilibriumRNN]):
    """A picture, and a network that learns it.

    Attributes:
        picture: that is learned.
        parts: which pixels `training`, `validation` and `test` are: indices, row by row.
        places: of all pixels.
        colors: likewise.
        painter: the network, as drawn, until it learns.
    """

    def __init__(self, config: Representation) -> None:
        self.picture = read_picture(config.image, config.side)
        self.painter = Painter.new(config)
        grid = self.picture.grid(config.stride)
        between = torch.nonzero(~grid).flatten()
        drawn = torch.randperm(len(between), generator=torch.Generator().manual_seed(HELD_OUT))
        self.parts = {"training": torch.nonzero(grid).flatten()}
        if config.stride > 1:
            validation, test = between[drawn].tensor_split([config.held_out])
            self.parts |= {"validation": validation, "test": test}
        weights = next(self.painter.network.parameters())
        self.places = places(config.side).to(weights)
        self.colors = self.picture.colors.reshape(-1, 3).to(weights)
        rows = self.parts["training"]
        examples = self.painter.encode(self.places[rows]), self.colors[rows]
        super().__init__(config, self.painter.network, examples, digest=self.picture.digest)

    @property
    def note(self) -> str:
        """What is learned from and judged by, and how good the simplest guess is."""
        counts = [f"{len(rows):,} for {name}" for name, rows in self.parts.items()]
        side = self.config.side
        note = f"{self.picture.source}, {side} x {side} pixels: {', '.join(counts)}"
        if "test" not in self.parts:
            return note
        return f"{note}. The nearest pixel that is learned from: {self.nearest():.2f} dB of test"

    def nearest(self) -> float:
        """The PSNR on test pixels of taking the nearest one of the grid."""
        side, stride = self.config.side, self.config.stride
        last = (side - 1) // stride
        along = ((torch.arange(side) + (stride - 1) // 2) // stride).clamp(max=last) * stride
        known = self.picture.colors[along][:, along].reshape(-1, 3)
        rows = self.parts["test"]
        return psnr(known[rows], self.picture.colors.reshape(-1, 3)[rows])

    def optimizer(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.network.parameters(), lr=self.config.outer_lr)

    def measured(self, *parts: str) -> dict[str, float]:
        """The PSNR on parts of the picture, of those that there are, by name."""
        found = {}
        for part in parts:
            if (rows := self.parts.get(part)) is not None:
                colors, _ = self.painter.colors(self.places[rows])
                found[f"{part}_psnr"] = psnr(colors, self.colors[rows])
        return found

    def model(self) -> Mapping[str, Any]:
        """What `Painter.load` reads."""
        return {
            "format": FORMAT,
            "equigrad": equigrad.__version__,
            "config": describe(self.config),
            "network": self.network.state_dict(),
            "encode": self.painter.encode.state_dict(),
        }

    def finish(self, directory: RunDirectory, console: Console) -> Mapping[str, Any]:
        """The PSNR of each part, and how many pixels are not at rest; the picture, drawn."""
        config = self.config
        _, unsettled = self.painter.colors(self.places)
        if unsettled:
            console.print(
                f"{config.label}: the network has not settled for {len(unsettled):,} of "
                f"{len(self.places):,} pixels within {config.solver.max_steps} steps",
                highlight=False,
                soft_wrap=True,
            )
        figures.save(
            pictures(self.picture, {config.label: directory.path}), directory.path / "picture.png"
        )
        return {
            "metrics": self.measured("training", "validation", "test"),
            "pixels": {name: len(rows) for name, rows in self.parts.items()},
            "pixels_unsettled": len(unsettled),
        }


def run(
    config: Representation, out: Path, *, resume: bool, console: Console
) -> dict[MethodName, dict[str, float]]:
    """Learn the picture in `out`, by the other method below it, and print what was reached.

    Returns:
        The metrics by method.
    """
    torch.set_num_threads(config.threads)
    job = Job(config)
    directory = RunDirectory(out, config, resume=resume)
    console.print(job.note, markup=False, highlight=False, soft_wrap=True)
    found: dict[MethodName, dict[str, float]] = {}
    folders: dict[str, Path] = {}
    for method, (label, _) in METHODS.items():
        if method == config.method:
            found[method] = job.learned(directory, resume=resume, console=console)
            folders[label] = out
        elif config.compare:
            other = Job(config.of(method))
            beside = RunDirectory(out / method, other.config, resume=resume)
            found[method] = other.learned(beside, resume=resume, console=console)
            folders[label] = out / method
    console.print(make_table(config, found))
    if config.compare:
        directory.write_json("table.json", found)
        figures.save(pictures(job.picture, folders), out / "comparison.png")
    return found


def make_table(config: Representation, found: Mapping[MethodName, Mapping[str, float]]) -> Table:
    """A line a method."""
    table = Table(title=f"a picture as a network, seed {config.seed}, scale {config.scale}")
    table.add_column("")
    for name in next(iter(found.values())):
        table.add_column(words(name), justify="right")
    for method, metrics in found.items():
        table.add_row(METHODS[method][0], *(f"{v:.2f}" for v in metrics.values()))
    return table


def pictures(true: Picture, folders: Mapping[str, Path]) -> Figure:
    """The picture, and what networks have made of it.

    Args:
        true: as it is.
        folders: of the runs that have learned it, by what stands above theirs.
    """
    panels = [("the picture", true.colors)]
    for label, folder in folders.items():
        found = Painter.load(folder).paint(true.side)
        panels.append((f"{label}\n{psnr(found, true.colors):.2f} dB over all pixels", found))
    figure = Figure(figsize=(3.6 * len(panels), 4.1), layout="constrained")
    for axes, (title, colors) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        axes.imshow(colors.numpy(), interpolation="nearest")
        axes.set_title(title, fontsize=10)
        axes.set_anchor("S")  # the titles have all the room there is
        axes.axis("off")
    return figure
