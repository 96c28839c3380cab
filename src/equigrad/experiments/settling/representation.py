"""The representation experiment: an equilibrium RNN that learns a picture."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

from equigrad.controllers import DynamicInversion
from equigrad.estimators import Adjoint, Estimator, LeastControl
from equigrad.experiments.data.picture import Picture, places, psnr, read_picture
from equigrad.experiments.runs import figures
from equigrad.experiments.runs.experiment import ScaleName, one_of
from equigrad.experiments.runs.formats import as_rich, words
from equigrad.experiments.runs.model import restored, save_model, saved_model
from equigrad.experiments.runs.run_directory import RunDirectory, describe
from equigrad.experiments.settling.network_training import NetworkTrainer, NetworkTraining
from equigrad.fields import Count, CountFrom0, Positive, require
from equigrad.nn import EquilibriumRNN, FourierFeatures
from equigrad.nn.batches import summed_squares
from equigrad.solvers import Anderson, Solver
from equigrad.training import OuterState, pick_device, pick_dtype
from equigrad.training.relaxation import settled_logits

PICTURE = "equigrad representation 1"
"""The file format of a saved representation."""

PictureMethodName = Literal["exact", "dynamic-inversion"]

REST = Anderson(tol=1e-3, max_steps=60)

PICTURE_METHODS: dict[PictureMethodName, tuple[str, Estimator]] = {
    "exact": ("recurrent backpropagation", Adjoint(solver=REST)),
    "dynamic-inversion": (
        "least control, dynamic inversion",
        # Picard's iteration settles the network alone, but not learner and controller together once
        # the weights have grown: docs/representation.md
        LeastControl(
            controller=DynamicInversion(
                gain=0.0, proportional=0.1, solver=Anderson(tol=3e-3, max_steps=60)
            ),
            start="params",
        ),
    ),
}
"""The methods that train the network: a label, and the estimator of its gradient."""

HELD_OUT_SEED = 0
"""Seed of the choice of validation pixels, the same for all runs."""


@dataclass(frozen=True, kw_only=True)
class Representation(NetworkTraining):
    """Learn a picture, as a map from place to colour, with an equilibrium RNN.

    The network settles under the Fourier features of a place, and its readout is the colour there.
    It learns from the pixels of a grid, by default every second one of every second row, by the
    exact gradient and by least control, and is tested on the pixels in between (PSNR).
    """

    score: ClassVar[str] = "psnr"

    # fields of NetworkTraining, documented there, with other defaults
    solver: Solver = REST
    outer_lr: Positive = 5e-3

    method: PictureMethodName = "exact"
    """The estimator of the gradient; with `compare`, the other one runs, too."""

    compare: bool = True
    """Whether to run the other method, too, from the same initial weights."""

    scale: ScaleName = "small"
    """Preset: `smoke` takes a few steps on few pixels as a test; `paper` a large picture."""

    seed: CountFrom0 = 0
    """Seed of the initial weights, of the Fourier features and of the order of pixels."""

    image: Path | None = None
    """Your own picture, cut to its middle square; by default a photograph of scikit-learn."""

    side: Count = 128
    """Height and width in pixels to which it is resized."""

    stride: Count = 2
    """Spacing of the training grid in pixels; 1 trains on all pixels, without a test."""

    held_out: Count = 1000
    """Number of other pixels for validation; the rest are for the test."""

    features: Count = 128
    """Number of frequencies of the Fourier features, each with a sine and a cosine."""

    frequency: Positive = 6.0
    """Standard deviation of the frequencies, in cycles over the picture."""

    hidden: Count = 128
    """Number of neurons."""

    epochs: Positive = 40
    """Passes over the training pixels."""

    batch: Count = 256
    """Number of pixels in a mini-batch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        learned = len(range(0, self.side, self.stride)) ** 2
        require(
            self.batch <= learned,
            f"batch must be at most the number of pixels that are learned from, {learned}, got "
            f"{self.batch}; lower it, or the stride",
        )
        between = self.side**2 - learned
        require(
            self.stride == 1 or self.held_out < between,
            f"held_out must leave some of the {between} pixels that are not learned from for "
            f"the test, got {self.held_out}; lower it, or take a larger side",
        )

    @classmethod
    def preset(cls, **chosen: str) -> Self:
        """The defaults for `method` and `scale`."""
        method = one_of(PICTURE_METHODS, "method", chosen.get("method", "exact"))
        small = cls(method=method, estimator=PICTURE_METHODS[method][1])
        scale = chosen.get("scale", "small")
        if scale == "paper":  # the photograph's full size; the paper's picture is not published
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

    def of(self, method: PictureMethodName) -> Self:
        """The same settings with another method."""
        return replace(self, compare=False, method=method, estimator=PICTURE_METHODS[method][1])

    @property
    def kind(self) -> type[Estimator]:
        """The estimator class of the method."""
        return type(PICTURE_METHODS[self.method][1])

    @property
    def label(self) -> str:
        """The method, in words."""
        return PICTURE_METHODS[self.method][0]


@dataclass(frozen=True)
class Painter:
    """A network that maps places to colours.

    Attributes:
        encode: Fourier features of a place.
        network: settles, and reads out a colour.
        solver: settles the network.
    """

    encode: FourierFeatures
    network: EquilibriumRNN
    solver: Solver

    @classmethod
    def new(cls, config: Representation) -> Self:
        """A painter that has not learned yet."""
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
        """Read the `model.pt` of a run, onto the CPU, without executing any code in it.

        Args:
            folder: folder of the run, or the file itself.

        Raises:
            RunError: there is no such file, or it is damaged.
        """
        saved = "a run saves it at its end"
        with saved_model(folder, PICTURE, what="a representation", saved=saved) as loaded:
            painter = cls.new(replace(restored(Representation, loaded["config"]), device="cpu"))
            painter.network.load_state_dict(loaded["network"])
            painter.encode.load_state_dict(loaded["encode"])
            return painter

    def colors(self, at: Tensor) -> tuple[Tensor, list[int]]:
        """Colours n x 3 of places n x 2 (from -1 to 1), and the indices of unsettled places."""
        weights = next(self.network.parameters())
        return settled_logits(self.network, self.encode(at.to(weights)), solver=self.solver)

    def paint(self, side: int) -> Tensor:
        """The picture at any resolution, side x side x 3, with values from 0 to 1."""
        found, _ = self.colors(places(side))
        return found.view(side, side, 3).clamp(0, 1).cpu()


class PictureTrainer(NetworkTrainer[Representation, EquilibriumRNN]):
    """Trains a network to represent a picture, and tests it.

    Attributes:
        picture: the picture.
        parts: indices of the pixels for `training`, `validation` and `test`, row by row.
        places: places of all pixels.
        colors: colours of all pixels.
        painter: the network, with initial weights until it learns.
    """

    def __init__(self, config: Representation) -> None:
        self.picture = read_picture(config.image, config.side)
        self.painter = Painter.new(config)
        grid = self.picture.grid(config.stride)
        between = torch.nonzero(~grid).flatten()
        drawn = torch.randperm(len(between), generator=torch.Generator().manual_seed(HELD_OUT_SEED))
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
        """A description of the training and test pixels, with the score of a simple guess."""
        counts = [f"{len(rows):,} for {name}" for name, rows in self.parts.items()]
        side = self.config.side
        note = f"{self.picture.source}, {side} x {side} pixels: {', '.join(counts)}"
        if "test" not in self.parts:
            return note
        return f"{note}. The nearest pixel that is learned from: {self.nearest():.2f} dB of test"

    def nearest(self) -> float:
        """The PSNR on test pixels of a copy of the nearest training pixel."""
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
        """The PSNR on the parts of the picture, as far as these exist, by name."""
        found = {}
        for part in parts:
            if (rows := self.parts.get(part)) is not None:
                colors, _ = self.painter.colors(self.places[rows])
                found[f"{part}_psnr"] = psnr(colors, self.colors[rows])
        return found

    def finish(self, state: OuterState, folder: Path, console: Console) -> dict[str, Any]:
        """Save and draw the picture; return the PSNR of its parts and the unsettled pixels."""
        config = self.config
        save_model(
            folder,
            PICTURE,
            config=describe(config),
            network=self.network.state_dict(),
            encode=self.painter.encode.state_dict(),
        )
        _, unsettled = self.painter.colors(self.places)
        if unsettled:
            console.print(
                f"{config.label}: the network has not settled for {len(unsettled):,} of "
                f"{len(self.places):,} pixels within {config.solver.max_steps} steps",
                highlight=False,
                soft_wrap=True,
            )
        figures.save(pictures(self.picture, {config.label: folder}), folder / "picture.png")
        return {
            "metrics": self.measured("training", "validation", "test"),
            "pixels": {name: len(rows) for name, rows in self.parts.items()},
            "pixels_unsettled": len(unsettled),
            "epochs": self.epochs(state),
        }


def learn_picture(
    config: Representation, out: Path, *, resume: bool, console: Console
) -> dict[PictureMethodName, dict[str, float]]:
    """Learn the picture in `out`, the other method in a folder below, and print the results.

    Returns:
        The metrics by method.
    """
    torch.set_num_threads(config.threads)
    trainer = PictureTrainer(config)
    directory = RunDirectory(out, config, resume=resume)
    console.print(trainer.note, markup=False, highlight=False, soft_wrap=True)
    found: dict[PictureMethodName, dict[str, float]] = {}
    folders: dict[str, Path] = {}
    for method, (label, _) in PICTURE_METHODS.items():
        if method == config.method:
            found[method] = trainer.learned(directory, resume=resume, console=console)
            folders[label] = out
        elif config.compare:
            other = PictureTrainer(config.of(method))
            beside = RunDirectory(out / method, other.config, resume=resume)
            found[method] = other.learned(beside, resume=resume, console=console)
            folders[label] = out / method
    console.print(
        as_rich(
            f"a picture as a network, seed {config.seed}, scale {config.scale}",
            [words(name) for name in found[config.method]],
            (
                [PICTURE_METHODS[method][0], *(f"{v:.2f}" for v in metrics.values())]
                for method, metrics in found.items()
            ),
        )
    )
    if config.compare:
        directory.write_json("table.json", found)
        figures.save(pictures(trainer.picture, folders), out / "comparison.png")
    return found


def pictures(true: Picture, folders: Mapping[str, Path]) -> Figure:
    """Draw the picture, and the pictures that networks have learned.

    Args:
        true: the true picture.
        folders: folders of the runs, by the titles of their pictures.
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
        axes.set_anchor("S")  # leave all free space to the titles
        axes.axis("off")
    return figure
