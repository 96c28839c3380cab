"""Folders of images, DIR/CLASS/*.png: reading, checking, and resizing to one size."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from equigrad.errors import DataError
from equigrad.experiments.data.images import Images
from equigrad.wording import counted, listed

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"})


@dataclass(frozen=True)
class ImageFolder:
    """The content of a folder.

    Attributes:
        images: images of one size, with class indices.
        classes: names of the subfolders, in order.
        files: paths of the images.
        notes: remarks for the user.
    """

    images: Images
    classes: tuple[str, ...]
    files: list[Path]
    notes: list[str]


def find(folder: Path) -> list[Path]:
    """The files in a folder and below with the extension of an image, except hidden ones.

    Raises:
        DataError: it is not a folder.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder of images")
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )


def read_classes(
    folder: Path,
    *,
    size: int,
    channels: int,
    skip_broken: bool = False,
    classes: tuple[str, ...] = (),
) -> ImageFolder:
    """Read a folder that has a subfolder for every class.

    Args:
        folder: folder of the subfolders.
        size: height and width to which images are resized.
        channels: 3 for colours, 1 for grey.
        skip_broken: whether to leave out files that cannot be read, with a note.
        classes: names of the required classes; by default, those that are found.

    Raises:
        DataError: there are no images, fewer than two classes, other classes than required, or
            broken files.
    """
    files = find(folder)
    loose = [path for path in files if path.parent == folder]
    inside = [path for path in files if path.parent != folder]
    found = tuple(sorted({path.relative_to(folder).parts[0] for path in inside}))
    if len(found) < 2 and not classes:
        what = f"images of one class only, {found[0]!r}" if found else "no images in subfolders"
        raise DataError(
            f"{folder} has {what}; expected a subfolder for every class, as in "
            f"{folder}/CLASS/*.png ({', '.join(sorted(SUFFIXES))})"
        )
    if classes and (strange := set(found) - set(classes)):
        raise DataError(
            f"{folder} has the classes {sorted(strange)}, allowed are {sorted(classes)}"
        )
    names = classes or found
    beside = f"not looked at: {counted(len(loose), 'image')} beside the classes"
    notes = [beside] if loose else []
    folders = {path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != "."}
    if empty := sorted(folders - set(found)):
        notes.append(f"folders without an image: {listed(empty)}")
    pixels, kept, broken = read_images(inside, size=size, channels=channels)
    if broken and not skip_broken:
        raise DataError(named(broken, len(inside)) + "; mend or remove them, or say --skip-broken")
    if broken:
        notes.append(named(broken, len(inside)) + ", left out")
    if not kept:
        raise DataError(f"{folder} has no image that can be read")
    labels = torch.tensor([names.index(path.relative_to(folder).parts[0]) for path in kept])
    return ImageFolder(Images(pixels, labels), names, kept, notes)


def named(broken: list[str], count: int) -> str:
    """A description of the broken files, with the names of at most ten."""
    more = f"\n  and {len(broken) - 10} more" if len(broken) > 10 else ""
    return f"{len(broken)} of {count} images cannot be read:\n  " + "\n  ".join(broken[:10]) + more


def read_images(
    files: list[Path], *, size: int, channels: int
) -> tuple[Tensor, list[Path], list[str]]:
    """Images cropped to their middle square, resized, and rotated as their EXIF data say.

    Returns:
        Pixels, n × channels × size × size; their files; and the other files, with reasons.
    """
    pixels, kept, broken = [], [], []
    for path in files:
        try:
            pixels.append(_read(path, size, "RGB" if channels == 3 else "L"))
            kept.append(path)
        except Exception as error:  # Pillow raises errors of many kinds
            broken.append(f"{path}: {str(error) or type(error).__name__}")
    shape = (0, channels, size, size)
    return torch.stack(pixels) if pixels else torch.zeros(shape).byte(), kept, broken


def _read(path: Path, size: int, mode: str) -> Tensor:
    from PIL import Image, ImageOps  # slow to import, and not needed for `--help`

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", category=UserWarning)
        with Image.open(path) as image:
            if image.mode in ("I", "F"):
                raise ValueError(f"{image.mode} pixels; save it with 8 or 16 bits a channel")
            image.draft(mode, (2 * size, 2 * size))
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):
                upright = upright.convert("I").point(lambda value: value / 257).convert("L")
            if "transparency" in upright.info or upright.mode in ("LA", "PA", "RGBA"):
                upright = upright.convert("RGBA")
                white = Image.new("RGBA", upright.size, "white")
                upright = Image.alpha_composite(white, upright)
            fitted = ImageOps.fit(upright.convert(mode), (size, size))
    flat = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8)
    return flat.reshape(size, size, -1).permute(2, 0, 1)
