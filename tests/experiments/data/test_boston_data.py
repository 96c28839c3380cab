import hashlib
import os

import pytest
import torch

from equigrad.errors import DataError
from equigrad.experiments.data import boston_housing as boston
from equigrad.experiments.data.files import FOLDER, DataFile

needs_data = pytest.mark.skipif(
    FOLDER not in os.environ, reason=f"{FOLDER} names no folder with the Boston housing data"
)


@needs_data
def test_numbers_of_the_first_row_and_means_that_are_published():
    """The mean home value of the data set is 22.53, its mean number of rooms 6.285."""
    features, target = boston.load()
    assert features.shape == (506, 13)
    assert features[0].tolist()[:6] == [0.00632, 18, 2.31, 0, 0.538, 6.575]
    assert target[0] == 24
    assert target.mean().item() == pytest.approx(22.53, abs=0.005)
    assert features[:, 5].mean().item() == pytest.approx(6.285, abs=5e-4)


def test_split_keeps_rows_together_and_standardises_with_the_training_rows():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(50, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.1])
    y = x @ torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64) + 7
    (a, b), (v, w) = boston.split(x, y, training_share=0.7, seed=0)
    assert (a.shape, b.shape, v.shape, w.shape) == ((35, 3), (35, 1), (15, 3), (15, 1))
    assert a.mean(0).abs().max() < 1e-12
    assert (a.std(0, correction=0) - 1).abs().max() < 1e-12
    assert v.mean(0).abs().max() > 1e-3  # the validation rows had no say
    # the target is still the same linear function of the features, in all rows
    everything = torch.cat([torch.cat([a, b], 1), torch.cat([v, w], 1)])
    solution = torch.linalg.lstsq(everything[:, :3], everything[:, 3:]).solution
    assert (everything[:, :3] @ solution - everything[:, 3:]).abs().max() < 1e-12
    other = boston.split(x, y, training_share=0.7, seed=1)[0][0]
    assert not torch.equal(a, other)
    assert torch.equal(a, boston.split(x, y, training_share=0.7, seed=0)[0][0])


@pytest.mark.parametrize("content", ["a,b\n1,two\n", "a,b\n1,2\n3\n", "a,b\n1,2\n"])
def test_tables_that_are_not_the_data(tmp_path, monkeypatch, content):
    monkeypatch.setenv(FOLDER, str(tmp_path))
    (tmp_path / "table.csv").write_text(content)
    md5 = hashlib.md5(content.encode()).hexdigest()
    with pytest.raises(DataError, match=r"table\.csv"):
        boston.load(DataFile(name="table.csv", md5=md5, url="https://example.org"))
