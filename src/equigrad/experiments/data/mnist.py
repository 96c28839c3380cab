"""MNIST (LeCun, Cortes, Burges 1998): handwritten digits, 60,000 to train and 10,000 to test.

The files are gzipped idx: a magic number that gives the type (bytes) and the number of dimensions,
the dimensions as big-endian numbers of four bytes, then the bytes.
"""

import gzip
import math
import struct
import zlib

import torch
from torch import Tensor

from equigrad.experiments.data.files import DataFile
from equigrad.experiments.data.images import Images

SHAPE = (1, 28, 28)
CLASSES = tuple("0123456789")

UNSIGNED_BYTES = 0x08


def _file(name: str, md5: str) -> DataFile:
    return DataFile(
        name=f"MNIST/raw/{name}",
        md5=md5,
        url=f"https://yann.lecun.com/exdb/mnist/{name}",
        mirrors=(f"https://ossci-datasets.s3.amazonaws.com/mnist/{name}",),
    )


TRAINING = (
    _file("train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
    _file("train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432"),
)
TEST = (
    _file("t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3"),
    _file("t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c"),
)


def load(files: tuple[DataFile, DataFile] = TRAINING) -> Images:
    """The training images, 60000 × 1 × 28 × 28, or with `TEST` the 10,000 test images.

    Raises:
        DataError: a file is missing, altered, or cannot be downloaded.
    """
    pixels, labels = (read_idx(file) for file in files)
    if pixels.ndim != 3 or labels.shape != pixels.shape[:1]:
        raise files[0].damaged(
            files[0].find(),
            f"images of shape {tuple(pixels.shape)} and labels of shape {tuple(labels.shape)}",
        )
    return Images(pixels[:, None], labels.long())


def read_idx(file: DataFile) -> Tensor:
    """The bytes of a gzipped idx file, in its shape.

    Raises:
        DataError: the file is missing or damaged.
    """
    path = file.find()
    try:
        content = gzip.decompress(path.read_bytes())
        zero, kind, dimensions = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{dimensions}I", content, offset=4)
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise file.damaged(path, error) from error
    body = content[4 + 4 * dimensions :]
    if (zero, kind) != (0, UNSIGNED_BYTES) or len(body) != math.prod(shape) or not body:
        raise file.damaged(
            path,
            f"an idx header that announces type {kind:#x} and shape {shape}, then {len(body)} "
            f"bytes",
        )
    return torch.frombuffer(bytearray(body), dtype=torch.uint8).reshape(shape)
