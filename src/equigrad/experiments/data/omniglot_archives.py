"""Omniglot (Lake, Salakhutdinov, Tenenbaum 2015): 1,623 characters, each drawn by 20 people.

The background set for training has 964 characters of 30 alphabets, the evaluation set 659
characters of 20 other alphabets. The zip files are verified by their content, since some were
created again from the same drawings.
"""

import re
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from equigrad.errors import ConfigurationError, DataError
from equigrad.experiments.data.files import DataFile

AlphabetSet = Literal["background", "evaluation"]

SIDE = 105
DRAWINGS = 20
CHARACTERS = {"background": 964, "evaluation": 659}
ALPHABETS = {"background": 30, "evaluation": 20}


def _file(part: AlphabetSet) -> DataFile:
    return DataFile(
        name=f"omniglot-py/images_{part}.zip",
        url=(
            "https://raw.githubusercontent.com/brendenlake/omniglot/master/"
            f"python/images_{part}.zip"
        ),
    )


FILES: dict[str, DataFile] = {
    "background": _file("background"),
    "evaluation": _file("evaluation"),
}


@dataclass(frozen=True)
class Drawings:
    """Characters and their drawings.

    Attributes:
        drawings: characters × 20 × side × side, from 0 (ink) to 255 (paper).
        alphabets: the alphabet of every character.
        characters: the name of every character in its alphabet, `character01` for example.
    """

    drawings: Tensor
    alphabets: tuple[str, ...]
    characters: tuple[str, ...]


def load(part: AlphabetSet, *, side: int = SIDE, file: DataFile | None = None) -> Drawings:
    """The background or the evaluation characters, in the order of their names.

    Args:
        part: `background` or `evaluation`.
        side: height and width in pixels; drawings are resized (Lanczos) if it is not 105.
        file: another zip file with the same content.

    Raises:
        DataError: the zip file is missing, cannot be downloaded, or does not contain these
            drawings; or Pillow, which reads them, is not installed.
        ConfigurationError: an unknown part, or side < 1.
    """
    if part not in FILES:
        raise ConfigurationError(f"part must be 'background' or 'evaluation', got {part!r}")
    if side < 1:
        raise ConfigurationError(f"side must be at least 1, got {side}")
    image = _pillow()
    file = file or FILES[part]
    path = file.find()
    try:
        with zipfile.ZipFile(path) as archive:
            names = _paths(archive, part)
            drawings = [_drawing(image, archive, name, side) for name in names]
    except Exception as error:  # a damaged zip or PNG may raise anything
        raise file.damaged(path, error) from error
    folders = [Path(name).parent for name in names[::DRAWINGS]]
    return Drawings(
        drawings=torch.stack(drawings).reshape(-1, DRAWINGS, side, side),
        alphabets=tuple(folder.parent.name for folder in folders),
        characters=tuple(folder.name for folder in folders),
    )


def _paths(archive: zipfile.ZipFile, part: AlphabetSet) -> list[str]:
    """Sorted paths of all drawings, whose number is checked."""
    shape = re.compile(rf"images_{part}/([^/]+)/character\d\d/\d{{4}}_\d\d\.png")
    found = [match for name in archive.namelist() if (match := shape.fullmatch(name))]
    names = sorted(match.string for match in found)
    alphabets = {match[1] for match in found}
    by_character = Counter(name.rpartition("/")[0] for name in names)
    complete = set(by_character.values()) == {DRAWINGS}
    if (len(alphabets), len(by_character)) != (ALPHABETS[part], CHARACTERS[part]) or not complete:
        raise ValueError(
            f"{len(names)} drawings of {len(by_character)} characters in {len(alphabets)} "
            f"alphabets, expected {DRAWINGS} of each of {CHARACTERS[part]} characters in "
            f"{ALPHABETS[part]} alphabets"
        )
    return names


def _drawing(image: Any, archive: zipfile.ZipFile, name: str, side: int) -> Tensor:
    with archive.open(name) as content, image.open(content) as drawing:
        if drawing.size != (SIDE, SIDE):
            raise ValueError(f"{name} has {drawing.size} pixels, expected {(SIDE, SIDE)}")
        grey = drawing.convert("L")
        if side != SIDE:
            grey = grey.resize((side, side), image.Resampling.LANCZOS)
        pixels = torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8)
    return pixels.reshape(side, side)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(
            f"reading Omniglot needs Pillow, one of the extra packages of equigrad[experiments] "
            f"({error}): pip install 'equigrad[experiments]'"
        ) from error
    return Image
