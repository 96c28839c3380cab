"""Labelled images, and their division into training, validation and test sets."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from equigrad.errors import ConfigurationError, DataError
from equigrad.training.split import Split


@dataclass(frozen=True)
class Images:
    """Images with labels, in their stored form.

    Attributes:
        pixels: n × channels × height × width, whole numbers from 0 to 255.
        labels: n, whole numbers from 0.
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Pixels:
    """The encoding of images as a network's inputs, with every channel standardised.

    Attributes:
        size: height and width.
        channels: 3 for colours, 1 for grey.
        mean: mean of each channel over the training and validation images.
        deviation: standard deviation of each channel over these images.
    """

    size: int
    channels: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    @classmethod
    def fit(cls, pixels: Tensor) -> Self:
        """Means and deviations of images, n × channels × size × size.

        Raises:
            DataError: a channel is constant.
        """
        deviation, mean = torch.std_mean(pixels.double(), dim=(0, 2, 3), correction=0)
        if not deviation.all():
            raise DataError("a channel has the same value in every pixel of all images")
        return cls(pixels.shape[2], len(mean), tuple(mean.tolist()), tuple(deviation.tolist()))

    def encode(self, pixels: Tensor) -> Tensor:
        """Standardised images, in float64."""
        mean, deviation = (
            torch.tensor(v, dtype=torch.float64) for v in (self.mean, self.deviation)
        )
        return (pixels.double() - mean[:, None, None]) / deviation[:, None, None]


def split(
    pool: Images,
    test: Images,
    *,
    samples: int,
    training: int,
    seed: int,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Split:
    """Draw images from a pool, the first ones for training and the others for validation.

    Every channel is standardised to zero mean and unit variance over training and validation images
    together, without the test images.

    Args:
        pool: images to draw from.
        test: test images, all of which are used.
        samples: number of images for training and validation together.
        training: number of images for training.
        seed: seed of the draw.
        device: device of the result.
        dtype: dtype of the inputs.

    Returns:
        The split, each part with inputs n × channels × height × width and labels n; its encoding
        standardises other images, which have to be square, in the same way.

    Raises:
        ConfigurationError: a part would be empty, or the pool has fewer images.
        DataError: several training images show one class only, or a channel is constant.

    Example:
        >>> pool = Images(torch.randint(256, (30, 1, 4, 4)), torch.arange(30) % 10)
        >>> parts = split(pool, pool, samples=20, training=8, seed=0)
        >>> parts.train[0].shape, len(parts.validation[1])
        (torch.Size([8, 1, 4, 4]), 12)
    """
    if not 1 <= training < samples:
        part = "training" if training < 1 else "validation"
        raise ConfigurationError(
            f"the {part} split would be empty: {training} of {samples} images are for training"
        )
    if samples > len(pool):
        raise ConfigurationError(
            f"{samples} images were asked for, and there are {len(pool)} to draw them from"
        )
    drawn = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:samples]
    labels = pool.labels[drawn]
    if training > 1 and len(labels[:training].unique()) == 1:
        raise DataError(
            f"all {training} training images of seed {seed} show class {labels[0].item()}, and a "
            f"learner of one class has nothing to tell apart; take another seed, or more of them"
        )
    seen = pool.pixels[drawn].to(device, dtype)
    deviation, mean = torch.std_mean(seen, dim=(0, 2, 3), correction=0, keepdim=True)
    if not deviation.all():
        raise DataError("a channel has the same value in every pixel of all images that were drawn")

    def standardised(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return (pixels.to(device, dtype) - mean) / deviation, labels.to(device)

    return Split(
        train=standardised(seen[:training], labels[:training]),
        validation=standardised(seen[training:], labels[training:]),
        test=standardised(test.pixels, test.labels),
        encoding=Pixels(
            seen.shape[2],
            seen.shape[1],
            tuple(mean.flatten().tolist()),
            tuple(deviation.flatten().tolist()),
        ),
    )
