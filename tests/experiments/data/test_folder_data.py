"""Folders of images as people have them, some of them broken."""

import pytest
import torch
from PIL import Image

from equigrad.errors import DataError
from equigrad.experiments.data.image_folder import find, read_classes, read_images
from equigrad.experiments.data.images import Pixels


def paint(path, color=(200, 30, 90), size=(20, 30), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).convert(mode).save(path, **options)
    return path


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_classes_are_the_subfolders(tmp_path):
    paint(tmp_path / "cat" / "a.png")
    paint(tmp_path / "dog" / "deeper" / "b.PNG", color=(0, 0, 0))
    paint(tmp_path / "dog" / ".hidden.png")
    paint(tmp_path / "loose.png")
    (tmp_path / "dog" / "notes.txt").write_text("good dog")
    found = read_classes(tmp_path, size=16, channels=3)
    assert found.classes == ("cat", "dog")
    assert found.images.labels.tolist() == [0, 1]
    assert found.images.pixels.shape == (2, 3, 16, 16)
    assert found.images.pixels[0, :, 5, 5].tolist() == [200, 30, 90]
    assert found.notes == ["not looked at: 1 image beside the classes"]
    paint(tmp_path / "emu" / ".hidden.png")
    (tmp_path / ".cache").mkdir()
    found = read_classes(tmp_path, size=16, channels=3)
    assert found.classes == ("cat", "dog")
    assert found.notes[1:] == ["folders without an image: 'emu'"]


def test_images_are_upright_and_cut_to_their_middle(tmp_path):
    """Left half red and right half blue, 60 × 20: the middle is half and half; EXIF turns it."""
    image = Image.new("RGB", (60, 20), (255, 0, 0))
    image.paste((0, 0, 255), (30, 0, 60, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise: left becomes top
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "turned.png", exif=exif)
    image.convert("RGBA").save(tmp_path / "turned-rgba.png", exif=exif)
    pixels, _, broken = read_images(find(tmp_path), size=16, channels=3)
    assert broken == []
    plain, transparent, turned = pixels[:, 0]  # how red
    assert torch.equal(transparent, turned)
    assert plain[8, 2] == 255
    assert plain[8, 13] == 0
    assert turned[2, 8] == 255
    assert turned[13, 8] == 0


def test_modes_become_what_the_network_sees(tmp_path):
    paint(tmp_path / "gray.png", (100, 100, 100), mode="L")
    paint(tmp_path / "palette.gif", (0, 0, 255), mode="P")
    see_through = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    see_through.save(tmp_path / "see-through.png")
    pixels, files, _ = read_images(find(tmp_path), size=16, channels=3)
    by_name = {path.stem: tuple(p[:, 5, 5].tolist()) for path, p in zip(files, pixels, strict=True)}
    assert by_name == {
        "gray": (100, 100, 100),
        "palette": (0, 0, 255),
        "see-through": (255, 255, 255),  # on white
    }
    gray, _, _ = read_images(files, size=16, channels=1)
    assert gray.shape == (3, 1, 16, 16)


def test_broken_files_are_named_or_skipped(tmp_path, monkeypatch):
    for kind in ("cat", "dog"):
        for i in range(8):
            paint(tmp_path / kind / f"{i}.png", size=(200, 200))
    for i in range(6):
        truncate(tmp_path / "cat" / f"{i}.png")
        (tmp_path / "dog" / f"{i}.png").write_text("not an image")
    Image.new("F", (20, 20)).save(tmp_path / "cat" / "deep.tiff")
    with pytest.raises(DataError, match="13 of 17 images cannot be read") as raised:
        read_classes(tmp_path, size=16, channels=3)
    assert str(raised.value).count("\n") == 11  # ten of them, and how many more
    assert "and 3 more" in str(raised.value)
    assert "8 or 16 bits a channel" in str(raised.value)
    kept = read_classes(tmp_path, size=16, channels=3, skip_broken=True)
    assert kept.images.labels.tolist() == [0, 0, 1, 1]
    assert kept.notes[0].startswith("13 of 17 images cannot be read")
    # a small file that would unpack to a wall of pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30_000)
    with pytest.raises(DataError, match="decompression bomb"):
        read_classes(tmp_path, size=16, channels=3)


def test_folders_that_are_not_of_classes(tmp_path):
    with pytest.raises(DataError, match="is no folder"):
        read_classes(tmp_path / "gone", size=16, channels=3)
    with pytest.raises(DataError, match="no images in subfolders"):
        read_classes(tmp_path, size=16, channels=3)
    paint(tmp_path / "a.png")
    with pytest.raises(DataError, match="no images in subfolders"):
        read_classes(tmp_path, size=16, channels=3)
    paint(tmp_path / "cat" / "a.png")
    with pytest.raises(DataError, match="images of one class only, 'cat'"):
        read_classes(tmp_path, size=16, channels=3)
    with pytest.raises(DataError, match=r"has the classes \['cat'\], allowed are \['dog', 'fox'\]"):
        read_classes(tmp_path, size=16, channels=3, classes=("fox", "dog"))
    truncate(paint(tmp_path / "dog" / "a.png", size=(200, 200)))
    truncate(tmp_path / "cat" / "a.png")
    with pytest.raises(DataError, match="no image that can be read"):
        read_classes(tmp_path, size=16, channels=3, skip_broken=True)


def test_pixels_are_standardised_by_what_was_seen():
    seen = torch.tensor([[0, 2], [10, 30]], dtype=torch.uint8)[:, :, None, None]  # two channels
    pixels = Pixels.fit(seen)
    assert (pixels.mean, pixels.deviation) == ((5.0, 16.0), (5.0, 14.0))
    other = torch.tensor([[[[15]], [[2]]]], dtype=torch.uint8)
    assert pixels.encode(other).flatten().tolist() == [2.0, -1.0]
    with pytest.raises(DataError, match="same value in every pixel"):
        Pixels.fit(seen[:1])
