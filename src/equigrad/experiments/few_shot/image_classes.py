"""Classes of images from a folder with a subfolder for each class."""

from pathlib import Path

from equigrad.experiments.data.image_folder import read_classes
from equigrad.tasks.classes import ClassCollection


def image_folder(
    folder: Path | str,
    *,
    size: int = 28,
    channels: int = 1,
    inverted: bool = False,
    skip_broken: bool = False,
) -> ClassCollection:
    """The images of DIR/CLASS/*.png, cropped to a square and resized.

    Args:
        folder: with the classes.
        size: height and width that images are made to have.
        channels: 3 for colours, 1 for grey.
        inverted: whether black is 1 and white 0, as with Omniglot, where ink is what counts.
        skip_broken: leave out files that cannot be read, and say so in the collection's notes.

    Returns:
        The classes, in order of their names; pixels from 0 (black) to 1 (white).

    Raises:
        DataError: there are no images, fewer than two classes, or broken files.
    """
    found = read_classes(Path(folder), size=size, channels=channels, skip_broken=skip_broken)
    pixels = found.images.pixels.float() / 255
    by_class = ClassCollection.from_labels(
        1 - pixels if inverted else pixels, found.images.labels, found.classes
    )
    return ClassCollection(by_class.examples, by_class.names, tuple(found.notes))
