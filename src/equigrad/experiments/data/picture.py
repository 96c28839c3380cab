"""One picture as examples: places and their colours."""

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from equigrad.errors import ConfigurationError, DataError
from equigrad.experiments.data.image_folder import read_images


@dataclass(frozen=True)
class Picture:
    """The middle square of a picture.

    Attributes:
        colors: side x side x 3, red, green and blue from 0 to 1.
        source: what it is of.
    """

    colors: Tensor
    source: str

    @property
    def side(self) -> int:
        """Its height and width in pixels."""
        return len(self.colors)

    @property
    def digest(self) -> str:
        """A checksum of its pixels."""
        return hashlib.sha256(self.colors.contiguous().numpy().tobytes()).hexdigest()

    def grid(self, stride: int) -> Tensor:
        """Which pixels are on a grid with so many pixels from line to line: a bool for each."""
        on = torch.zeros(self.side, self.side, dtype=torch.bool)
        on[::stride, ::stride] = True
        return on.flatten()


def read_picture(path: Path | None, side: int) -> Picture:
    """The middle square of a user's picture, or of a photograph that comes with scikit-learn.

    Args:
        path: a file of an image; None for the photograph.
        side: height and width that it is made to have.

    Raises:
        DataError: it cannot be read, or has fewer pixels.
    """
    from PIL import Image  # takes a moment, which `--help` need not wait for

    place = Path(str(files("sklearn.datasets.images") / "china.jpg")) if path is None else path
    source = "scikit-learn's photograph china.jpg" if path is None else str(path)
    pixels, _, broken = read_images([place], size=side, channels=3)
    if broken:
        raise DataError(f"the picture cannot be read: {broken[0]}")
    with Image.open(place) as image:
        least = min(image.size)
    if least < side:
        raise DataError(
            f"{source} has {least} pixels along its shorter side, and {side} are asked for; say "
            f"--side {least}"
        )
    return Picture(pixels[0].permute(1, 2, 0).float() / 255, source)


def places(side: int) -> Tensor:
    """The middles of the pixels of a square, row by row: side² x 2, from -1 to 1.

    Example:
        >>> places(2)
        tensor([[-0.5000, -0.5000],
                [-0.5000,  0.5000],
                [ 0.5000, -0.5000],
                [ 0.5000,  0.5000]])
    """
    along = (2 * torch.arange(side) + 1) / side - 1
    return torch.stack(torch.meshgrid(along, along, indexing="ij"), -1).reshape(-1, 2)


def psnr(found: Tensor, true: Tensor) -> float:
    """Peak signal to noise in decibels, `-10 log₁₀` of the mean squared error; 100 at most.

    Args:
        found: colours, of which those outside of 0 to 1 are taken to its ends, as a screen does.
        true: from 0 to 1.

    Example:
        >>> psnr(torch.tensor([0.5, 0.1, 1.2]), torch.tensor([0.5, 0.4, 1.0]))  # MSE 0.03
        15.228...
    """
    if found.shape != true.shape:
        raise ConfigurationError(
            f"colours of shape {tuple(found.shape)} are compared with {tuple(true.shape)}"
        )
    error = (found.clamp(0, 1) - true).double().square().mean()
    return -10 * error.clamp(min=1e-10).log10().item()  # infinity has no place in a file of JSON
