"""The Boston housing data (Harrison, Rubinfeld 1978), only to reproduce the paper's Fig. 2.

506 districts, 13 features and the median value of a home, in 1000 dollars. The data set is retired:
its feature B is a function of the share of Black residents that presumes their effect on prices.
Scikit-learn, whose release 1.1.3 was the last to contain it, advises against its use.
"""

import csv

import torch
from torch import Tensor

from equigrad.errors import DataError
from equigrad.experiments.data.files import DataFile


def without_first_line(content: bytes) -> bytes:
    """The content after the line of counts that scikit-learn puts before the header."""
    return content.partition(b"\n")[2]


FILE = DataFile(
    name="boston/boston_housing.csv",
    md5="7a71c16a224f1f351dbf19b08de0f7b2",
    url=(
        "https://raw.githubusercontent.com/scikit-learn/scikit-learn/1.1.3/"
        "sklearn/datasets/data/boston_house_prices.csv"
    ),
    convert=without_first_line,
)
FEATURES = 13


def load(file: DataFile = FILE) -> tuple[Tensor, Tensor]:
    """Features (506 × 13) and the target MEDV (506), in float64, in the order of the file.

    Raises:
        DataError: the file is missing, altered, or cannot be downloaded.
    """
    path = file.find()
    with path.open(newline="") as lines:
        _, *rows = csv.reader(lines)
    try:
        table = torch.tensor([[float(value) for value in row] for row in rows], dtype=torch.float64)
    except ValueError as error:
        raise DataError(f"{path} is not a table of numbers under a header: {error}") from error
    if table.ndim != 2 or table.shape[1] != FEATURES + 1:
        raise DataError(f"{path} has shape {tuple(table.shape)}, expected {FEATURES + 1} columns")
    return table[:, :FEATURES], table[:, FEATURES]


def split(
    features: Tensor, target: Tensor, *, training_share: float, seed: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and validation rows, standardised with the statistics of the training rows.

    Args:
        features: rows × columns.
        target: rows.
        training_share: share of training rows, between 0 and 1; their number is rounded.
        seed: seed of the choice of training rows.

    Returns:
        `(x, y)` of the training rows, then of the validation rows; targets are rows × 1.

    Example:
        >>> x = torch.arange(20.0).reshape(10, 2)
        >>> (x, y), (v, w) = split(x, torch.arange(10.0), training_share=0.7, seed=0)
        >>> x.shape, w.shape
        (torch.Size([7, 2]), torch.Size([3, 1]))
    """
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(seed))
    table = torch.cat([features, target[:, None]], dim=1)[order]
    training = round(training_share * len(target))
    mean, deviation = table[:training].mean(0), table[:training].std(0, correction=0)
    table = (table - mean) / deviation
    x, y = table[:, :-1], table[:, -1:]
    return (x[:training], y[:training]), (x[training:], y[training:])
