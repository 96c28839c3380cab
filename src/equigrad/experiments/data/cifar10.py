"""CIFAR-10 (Krizhevsky 2009): small photographs in ten classes, from the Python version.

The files are pickles of Python 2. Since a pickle can call any function, they are read by an
unpickler that allows only the three names in these files, with stand-ins: none of their code runs.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from equigrad.experiments.data.files import DataFile
from equigrad.experiments.data.images import Images

SHAPE = (3, 32, 32)
CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


def _file(name: str, md5: str) -> DataFile:
    return DataFile(
        name=f"cifar-10-batches-py/{name}",
        md5=md5,
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        archive=True,
    )


TRAINING = (
    _file("data_batch_1", "c99cafc152244af753f735de768cd75f"),
    _file("data_batch_2", "d4bba439e000b95fd0a9bffe97cbabec"),
    _file("data_batch_3", "54ebc095f3ab1f0389bbae665268c751"),
    _file("data_batch_4", "634d18415352ddfa80567beed471001a"),
    _file("data_batch_5", "482c414d41f54cd18b22e5b47cb7c3cb"),
)
TEST = (_file("test_batch", "40351d587109b95175f43aff81a1287e"),)


def load(files: tuple[DataFile, ...] = TRAINING) -> Images:
    """The training images, 50000 × 3 × 32 × 32, or with `TEST` the 10,000 test images.

    If the user's folder has only some of the training batches, their images are returned; the first
    batch has to be there.

    Raises:
        DataError: a file is missing, altered, or cannot be downloaded.
    """
    first, *others = files
    batches = [read_batch(file) for file in (first, *(f for f in others if not f.withheld))]
    return Images(
        torch.cat([batch.pixels for batch in batches]),
        torch.cat([batch.labels for batch in batches]),
    )


def read_batch(file: DataFile) -> Images:
    """The images of one file.

    Raises:
        DataError: the file is missing or damaged, or has unexpected content.
    """
    path = file.find()
    try:
        content = _read(path)
        array, labels = content[b"data"], torch.tensor(content[b"labels"])
        pixels = array.as_bytes().reshape(-1, *SHAPE)
        if labels.shape != (len(pixels),) or not ((labels >= 0) & (labels < 10)).all():
            raise ValueError(f"{len(pixels)} images, and labels that are not so many from 0 to 9")
    except Exception as error:  # a damaged pickle may raise anything
        raise file.damaged(path, error) from error
    return Images(pixels, labels)


def _read(path: Path) -> Any:
    return _Unpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()


class _Array:
    """A stand-in for an array in the pickle."""

    def __setstate__(self, state: tuple[int, tuple[int, ...], "_Type", bool, bytes]) -> None:
        _, self.shape, self.type, self.by_columns, self.content = state

    def as_bytes(self) -> torch.Tensor:
        """The array, checked to consist of unsigned bytes, row by row."""
        if self.type.name != b"u1" or self.by_columns or len(self.shape) != 2:
            raise ValueError("its data are not rows of unsigned bytes")
        flat = torch.frombuffer(bytearray(self.content), dtype=torch.uint8)
        return flat.reshape(self.shape)


class _Type:
    """A stand-in for an array's dtype in the pickle."""

    def __init__(self, name: bytes, *options: int) -> None:
        self.name = name

    def __setstate__(self, state: object) -> None:
        """Ignore byte order and fields, which unsigned bytes do not have."""


class _Class:
    """A stand-in for the class of arrays."""


def _make(kind: type, shape: tuple[int, ...], code: bytes) -> _Array:
    return _Array()


STAND_INS = {
    ("numpy.core.multiarray", "_reconstruct"): _make,
    ("numpy", "ndarray"): _Class,
    ("numpy", "dtype"): _Type,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return STAND_INS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which no file of CIFAR-10 does, and which was not "
                f"run"
            ) from None
