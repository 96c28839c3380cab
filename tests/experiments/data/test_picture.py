"""A picture as examples: places, colours, and files that are none."""

import pytest
import torch
from PIL import Image

from equigrad.errors import ConfigurationError, DataError
from equigrad.experiments.data.picture import Picture, places, psnr, read_picture


def test_a_file_keeps_its_colours_and_their_places(tmp_path):
    """Wider than high: the middle square, whose corners have colours of their own."""
    corners = {(1, 0): (255, 0, 0), (4, 0): (0, 255, 0), (1, 3): (0, 0, 255), (4, 3): (51, 51, 51)}
    image = Image.new("RGB", (6, 4), "white")
    for at, color in corners.items():
        image.putpixel(at, color)
    image.save(tmp_path / "mine.png")
    picture = read_picture(tmp_path / "mine.png", 4)
    found = {
        at: picture.colors[row, col].tolist()
        for at, (row, col) in zip(
            [(-1, -1), (-1, 1), (1, -1), (1, 1)], [(0, 0), (0, 3), (3, 0), (3, 3)], strict=True
        )
    }
    assert found == {
        (-1, -1): [1, 0, 0],
        (-1, 1): [0, 1, 0],
        (1, -1): [0, 0, 1],
        (1, 1): pytest.approx([0.2, 0.2, 0.2]),
    }
    assert places(4)[3].tolist() == [-0.75, 0.75]  # the upper right corner is the fourth pixel
    assert picture.source == str(tmp_path / "mine.png")


def test_the_grid_has_every_other_pixel_of_every_other_row():
    picture = Picture(torch.zeros(5, 5, 3), "nothing")
    assert torch.nonzero(picture.grid(2)).flatten().tolist() == [0, 2, 4, 10, 12, 14, 20, 22, 24]
    assert picture.grid(1).all()


def test_a_photograph_is_there_without_a_file():
    picture = read_picture(None, 32)
    assert picture.colors.shape == (32, 32, 3)
    assert 0 <= picture.colors.min() < 0.2 < 0.8 < picture.colors.max() <= 1


def test_files_that_are_no_pictures(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(DataError, match=r"cannot be read: .*text\.png: cannot identify"):
        read_picture(tmp_path / "text.png", 8)
    with pytest.raises(DataError, match=r"cannot be read: .*missing\.png: .*No such file"):
        read_picture(tmp_path / "missing.png", 8)
    Image.new("RGB", (9, 7)).save(tmp_path / "small.png")
    with pytest.raises(DataError, match=r"has 7 pixels along its shorter side.*say --side 7"):
        read_picture(tmp_path / "small.png", 8)


def test_decibels():
    """An error of a tenth everywhere is 20 dB; what a screen cannot show is cut."""
    true = torch.full((4, 3), 0.5)
    assert psnr(true + 0.1, true) == pytest.approx(20.0, abs=1e-4)
    assert psnr(torch.full((4, 3), 7.0), torch.ones(4, 3)) == pytest.approx(100.0)
    with pytest.raises(ConfigurationError, match=r"\(4, 3\) are compared with \(3,\)"):
        psnr(true, torch.ones(3))
