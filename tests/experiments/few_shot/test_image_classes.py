"""A user's folder of images becomes classes to draw tasks from."""

import pytest

from equigrad.errors import DataError
from equigrad.experiments.few_shot.image_classes import image_folder
from equigrad.tasks import NWayKShot

Image = pytest.importorskip("PIL.Image")


def paint(path, grey, count):
    path.mkdir()
    for i in range(count):
        Image.new("L", (20, 30), grey).save(path / f"{i}.png")


def test_subfolders_are_classes(tmp_path):
    paint(tmp_path / "dark", 51, 4)
    paint(tmp_path / "light", 204, 6)
    classes = image_folder(tmp_path, size=8)
    assert classes.names == ("dark", "light")
    assert [own.shape for own in classes] == [(4, 1, 8, 8), (6, 1, 8, 8)]
    assert [own.mean().item() for own in classes] == pytest.approx([0.2, 0.8])
    inverted = image_folder(tmp_path, size=8, channels=3, inverted=True)
    assert inverted[0].shape == (4, 3, 8, 8)
    assert [own.mean().item() for own in inverted] == pytest.approx([0.8, 0.2])
    batch = NWayKShot(classes, way=2, shot=1, queries=3).sample(2, draw=0)
    assert batch.query[0].shape == (2, 6, 1, 8, 8)
    with pytest.raises(DataError, match="need 5 examples of every class, but class 'dark' has 4"):
        NWayKShot(classes, way=2, shot=1, queries=4)


def test_broken_files_are_named_or_left_out(tmp_path):
    paint(tmp_path / "cat", 0, 2)
    paint(tmp_path / "dog", 255, 2)
    for i in range(2):
        (tmp_path / "cat" / f"{i}.png").write_text("not an image")
    with pytest.raises(DataError, match="2 of 4 images cannot be read"):
        image_folder(tmp_path)
    classes = image_folder(str(tmp_path), skip_broken=True)
    assert "2 of 4 images cannot be read" in classes.notes[0]
    assert [len(own) for own in classes] == [0, 2]
    with pytest.raises(DataError, match="class 'cat' has 0"):
        NWayKShot(classes, way=2, queries=1)
