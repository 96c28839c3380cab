"""One picture as a data set, with pixel positions as inputs and colours as targets."""

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
        source: description of its source.
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
        """A mask of the pixels on a grid with this spacing."""
        on = torch.zeros(self.side, self.side, dtype=torch.bool)
        on[::stride, ::stride] = True
        return on.flatten()


def read_picture(path: Path | None, side: int) -> Picture:
    """The middle square of a user's picture, or of a photograph that comes with scikit-learn.

    Args:
        path: an image file; None for the photograph.
        side: height and width to which it is resized.

    Raises:
        DataError: it cannot be read, or has fewer pixels.
    """
    from PIL import Image  # slow to import, and not needed for `--help`

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
    """The centres of the pixels of a square, row by row: side² x 2, from -1 to 1.

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
    """Peak signal-to-noise ratio in decibels, `-10 log₁₀` of the mean squared error; at most 100.

    Args:
        found: colours, which are clipped to the range from 0 to 1, as on a screen.
        true: true colours, from 0 to 1.

    Example:
        >>> psnr(torch.tensor([0.5, 0.1, 1.2]), torch.tensor([0.5, 0.4, 1.0]))  # MSE 0.03
        15.228...
    """
    if found.shape != true.shape:
        raise ConfigurationError(
            f"colours of shape {tuple(found.shape)} are compared with {tuple(true.shape)}"
        )
    error = (found.clamp(0, 1) - true).double().square().mean()
    return -10 * error.clamp(min=1e-10).log10().item()  # JSON has no infinity
