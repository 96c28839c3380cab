"""The folder experiment: a strength for every weight of a network trained on users' images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from equigrad.estimators import Contrastive
from equigrad.experiments.data.image_folder import read_classes
from equigrad.experiments.data.images import Pixels
from equigrad.experiments.runs.methods import PAPERS_RULE
from equigrad.experiments.runs.model import Architecture
from equigrad.experiments.strengths.own_data import OwnData
from equigrad.fields import Count, Positive, Share, at_least
from equigrad.solvers import GradientDescent
from equigrad.training.split import Split, divide
from equigrad.training.targets import Classes

FOLDER_SOLVER = GradientDescent(lr=0.01, momentum=0.9, nesterov=True, max_steps=200)


@dataclass(frozen=True, kw_only=True)
class Folder(OwnData):
    """Learn a regularisation strength for every weight of a LeNet-5 that sees your own images.

    The folder has a subfolder for every class, DIR/CLASS/*.png; or DIR/train and DIR/test have
    them. They are divided into a training, a validation and a test set, and every weight's strength
    follows the hypergradient of the validation loss. Beside it: no regularisation, the best of 13
    single strengths, and the other estimator. The run leaves a model for `equigrad predict`.
    """

    images: Path
    """Folder of the images."""

    size: Annotated[int, at_least(16)] = 32
    """Height and width to which images are resized, at least 16."""

    gray: bool = False
    """Whether to convert images to grey."""

    skip_broken: bool = False
    """Leave out files that cannot be read; by default they are listed, and the run stops."""

    training_share: Share = 0.5
    """Share of the other images that is the training set; the rest is the validation set."""

    samples: Count | None = None
    """Number of images for training and validation together; by default all but the test set."""

    outer_steps: Count = 30
    """Number of Adam's steps on the strengths, which are clamped at zero."""

    outer_lr: Positive = 0.001
    """Adam's step size."""

    solver: GradientDescent = FOLDER_SOLVER
    """How the network is trained (the free phase), from the same start each time."""

    contrastive: Contrastive = PAPERS_RULE
    """The contrastive rule; its nudged phases use the free phase's solver, but their own length."""

    nudged_steps: Count = 50
    """Number of steps of each nudged phase."""

    batch: Count | None = 100
    """Largest size of a mini-batch; None to use all images at once."""

    def batch_sizes(self) -> tuple[int | None, int | None]:
        """Size of a mini-batch for training and for validation; None to use all images at once."""
        return self.batch, self.batch

    @classmethod
    def _asked_for(cls) -> tuple[str, ...]:
        return ("images",)

    @property
    def name(self) -> str:
        """The name of the folder."""
        return f"images in {Path(self.images).name}"

    def load(self, device: torch.device, dtype: torch.dtype) -> Split:
        """Images drawn by the seed; those in DIR/test, if there are any, are the test set."""
        folder = Path(self.images)
        options = {
            "size": self.size,
            "channels": 1 if self.gray else 3,
            "skip_broken": self.skip_broken,
        }
        if divided := (folder / "train").is_dir() and (folder / "test").is_dir():
            pool = read_classes(folder / "train", **options)
            held_out = read_classes(folder / "test", **options, classes=pool.classes)
            fixed = f"--test-share is not used: the images in {folder / 'test'} are for testing"
            notes = [fixed, *pool.notes, *held_out.notes]
        else:
            pool = held_out = read_classes(folder, **options)
            notes = pool.notes
        rows = divide(
            pool.images.labels,
            test_share=0 if divided else self.test_share,
            training_share=self.training_share,
            samples=self.samples,
            seed=self.seed,
            names=pool.classes,
        )
        tested = torch.arange(len(held_out.images)) if divided else rows.test
        pixels = Pixels.fit(pool.images.pixels[rows.seen])

        def part(images: Any, chosen: Tensor) -> tuple[Tensor, Tensor]:
            x = pixels.encode(images.pixels[chosen])
            return x.to(device, dtype), images.labels[chosen].to(device)

        counts = [len(chosen) for chosen in (rows.train, rows.validation, tested)]
        about = (
            f"{len(pool.classes)} classes ({', '.join(pool.classes)}); {counts[0]:,} training, "
            f"{counts[1]:,} validation and {counts[2]:,} test images of {folder}"
        )
        return Split(
            part(pool.images, rows.train),
            part(pool.images, rows.validation),
            part(held_out.images, tested),
            target=Classes(pool.classes),
            encoding=pixels,
            note="\n".join([about, *notes]),
        )

    def architecture(self, split: Split) -> Architecture:
        """LeNet-5 without batch normalisation, so that outputs depend on one image only."""
        _, channels, side, _ = split.train[0].shape
        arguments = {"channels": channels, "side": side, "outputs": split.target.outputs}
        return Architecture("lenet5", {**arguments, "normalise": False})
