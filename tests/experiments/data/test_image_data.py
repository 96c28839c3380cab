"""MNIST, CIFAR-10 and Omniglot: files made here, damaged ones, a malicious one, the real ones."""

import gzip
import hashlib
import io
import os
import pickle
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import torch

from equigrad.errors import ConfigurationError, DataError
from equigrad.experiments.data import cifar10, mnist
from equigrad.experiments.data import omniglot_archives as omniglot
from equigrad.experiments.data.files import FOLDER, DataFile
from equigrad.experiments.data.images import Images, split

needs_data = pytest.mark.skipif(
    FOLDER not in os.environ, reason=f"{FOLDER} names no folder with the images"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER, str(tmp_path))
    return tmp_path


def put(folder, name, content, md5=None):
    (folder / name).write_bytes(content)
    return DataFile(name=name, md5=md5, url="https://example.org")


def idx(array, kind=8):
    return struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape) + array.tobytes()


PIXELS = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


def test_idx_is_read_in_its_shape(folder):
    files = (
        put(folder, "images.gz", gzip.compress(idx(PIXELS))),
        put(folder, "labels.gz", gzip.compress(idx(np.array([7, 3], dtype=np.uint8)))),
    )
    images = mnist.load(files)
    assert images.pixels.shape == (2, 1, 3, 4)
    assert images.pixels[1, 0, 2].tolist() == [20, 21, 22, 23]
    assert images.labels.tolist() == [7, 3]
    with pytest.raises(DataError, match=r"images of shape \(2,\) and labels of shape \(2, 3, 4\)"):
        mnist.load((files[1], files[0]))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not gzip",
        gzip.compress(idx(PIXELS), mtime=0)[:-9],
        gzip.compress(b"\0\0", mtime=0),
        gzip.compress(idx(PIXELS)[:-1], mtime=0),
        gzip.compress(idx(PIXELS) + b"\0", mtime=0),
        gzip.compress(idx(PIXELS, kind=13), mtime=0),
        gzip.compress(idx(PIXELS[:0]), mtime=0),
    ],
)
def test_damaged_idx_is_named_with_a_remedy(folder, content):
    with pytest.raises(DataError, match=r"images\.gz is not the .*Replace it, or unset"):
        mnist.read_idx(put(folder, "images.gz", content))


def as_python_2_wrote_it(array, labels):
    """A batch of CIFAR-10: protocol 2, keys and data as byte strings, numpy by its old name."""

    def text(value):
        return b"U" + bytes([len(value)]) + value  # SHORT_BINSTRING

    def whole(value):
        return b"K" + bytes([value])

    shape = b"".join(b"M" + struct.pack("<H", n) for n in array.shape)
    body = array.tobytes()
    return b"".join(
        [
            b"\x80\x02}(",
            text(b"data"),
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n",
            *(whole(0), b"\x85", text(b"b"), b"tR"),
            *(b"(", whole(1), b"(", shape, b"t"),
            *(b"cnumpy\ndtype\n(", text(b"u1"), whole(0), whole(1), b"tR"),
            *(b"(", whole(3), text(b"|"), b"NNN", b"J\xff\xff\xff\xff" * 2, whole(0), b"tb"),
            *(b"\x89", b"T" + struct.pack("<i", len(body)), body, b"tb"),
            text(b"labels"),
            *(b"](", *map(whole, labels), b"e"),
            b"u.",
        ]
    )


PHOTOS = np.random.default_rng(0).integers(0, 256, (3, 3072), dtype=np.uint8)


def test_python_2_pickle_is_read_without_numpy(folder):
    content = as_python_2_wrote_it(PHOTOS, [9, 0, 4])
    # numpy itself reads the same from what is made here
    assert np.array_equal(pickle.loads(content, encoding="bytes")[b"data"], PHOTOS)
    images = cifar10.read_batch(put(folder, "batch", content))
    assert images.labels.tolist() == [9, 0, 4]
    assert np.array_equal(images.pixels.flatten(1).numpy(), PHOTOS)
    assert images.pixels[1, 2, 0, 5] == PHOTOS[1, 2 * 1024 + 5]  # channel, then row, then column


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("stolen",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({b"data": Malicious()}), r"asks for posix\.mkdir.* was not run"),
        (b"cbuiltins\neval\n(U\x011tR.", r"asks for builtins\.eval"),
        (b"cnumpy\nload\n(U\x011tR.", r"asks for numpy\.load"),
        (b"cnumpy\ndtype.type\n.", r"asks for numpy\.dtype\.type"),
        (as_python_2_wrote_it(PHOTOS, [9, 0, 4])[:-40], "not the batch it should be"),
        (as_python_2_wrote_it(PHOTOS, [9, 0]), "3 images, and labels"),
        (as_python_2_wrote_it(PHOTOS, [9, 0, 10]), "3 images, and labels"),
        (as_python_2_wrote_it(PHOTOS[:, :5], [9, 0, 4]), "not the batch it should be"),
        (pickle.dumps([1]), "not the batch it should be"),
        (b"", "not the batch it should be"),
    ],
)
def test_malicious_and_damaged_pickles_are_refused(folder, monkeypatch, content, message):
    monkeypatch.chdir(folder)
    with pytest.raises(DataError, match=message):
        cifar10.read_batch(put(folder, "batch", content))
    assert not (folder / "stolen").exists()


def test_training_batches_that_are_there_are_taken(folder):
    files = [
        put(folder, f"batch_{i}", as_python_2_wrote_it(PHOTOS + i, [i, i, i])) for i in range(3)
    ]
    (folder / "batch_1").unlink()
    assert cifar10.load(tuple(files)).labels.tolist() == [0, 0, 0, 2, 2, 2]
    (folder / "batch_0").unlink()
    with pytest.raises(DataError, match="batch_0 is not there"):
        cifar10.load(tuple(files))


def test_archive_is_fetched_once_for_all_its_files(tmp_path, monkeypatch):
    pooch = pytest.importorskip("pooch")
    monkeypatch.delenv(FOLDER, raising=False)
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / project)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name in ("set/one", "set/two"):
            entry = tarfile.TarInfo(name)
            entry.size = len(name)
            tar.addfile(entry, io.BytesIO(name.encode()))
    asked = []

    def retrieve(url, known_hash, fname, path, progressbar):
        asked.append(url)
        path.mkdir(parents=True, exist_ok=True)
        (path / fname).write_bytes(packed.getvalue())

    monkeypatch.setattr(pooch, "retrieve", retrieve)

    def member(name):
        md5 = hashlib.md5(name.encode()).hexdigest()
        return DataFile(name=name, md5=md5, url="https://example.org/set.tar.gz", archive=True)

    assert [member(f"set/{n}").find().read_text() for n in ("one", "two")] == ["set/one", "set/two"]
    assert asked == ["https://example.org/set.tar.gz"]
    with pytest.raises(DataError, match=r"set/three.*set\.tar\.gz.*Delete it"):
        member("set/three").find()
    (tmp_path / "equigrad" / "set.tar.gz").write_bytes(packed.getvalue()[:60])
    (tmp_path / "equigrad" / "set" / "one").unlink()
    with pytest.raises(DataError, match=r"set/one.*set\.tar\.gz.*Delete it"):
        member("set/one").find()


def test_mirror_is_asked_where_the_home_fails_or_has_changed(tmp_path, monkeypatch):
    pooch = pytest.importorskip("pooch")
    monkeypatch.delenv(FOLDER, raising=False)
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / project)
    homes = {"https://a/f": None, "https://b/f": b"<html>moved</html>", "https://c/f": b"good"}

    def retrieve(url, known_hash, fname, path, progressbar):
        path.mkdir(parents=True, exist_ok=True)
        if homes[url] is None:
            raise OSError("404")
        (path / fname).write_bytes(homes[url])

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    first, *mirrors = homes
    md5 = hashlib.md5(b"good").hexdigest()
    file = DataFile(name="f", md5=md5, url=first, mirrors=tuple(mirrors))
    assert file.find().read_bytes() == b"good"
    (tmp_path / "equigrad" / "f").unlink()
    homes["https://c/f"] = b"bad"
    with pytest.raises(DataError, match=r"https://a/f: 404; nor from https://b/f: .*is not what"):
        file.find()


@pytest.fixture
def tiny_omniglot(folder, monkeypatch):
    """Two alphabets, of one and two characters; the zip and what it was made of."""
    image = pytest.importorskip("PIL.Image")
    monkeypatch.setitem(omniglot.ALPHABETS, "background", 2)
    monkeypatch.setitem(omniglot.CHARACTERS, "background", 3)
    generator = np.random.default_rng(0)
    drawings = {}
    for c, character in enumerate(("B/character02", "A/character01", "B/character01")):
        for d in range(20):
            ink = np.repeat(np.repeat(generator.random((35, 35)) < 0.9, 3, 0), 3, 1)
            content = io.BytesIO()
            image.fromarray(255 * ink.astype(np.uint8)).convert("1").save(content, "png")
            path = f"images_background/{character}/{c + 1:04}_{d + 1:02}.png"
            drawings[path] = (content.getvalue(), ink)

    def zipped(**changes):
        with zipfile.ZipFile(folder / "set.zip", "w") as archive:
            archive.writestr("images_background/", "")
            archive.writestr("__MACOSX/images_background/._A", "junk")
            for path, (content, _) in drawings.items():
                if path not in changes.get("without", ()):
                    archive.writestr(path, changes.get("content", {}).get(path, content))
        return DataFile(name="set.zip", url="https://example.org")

    return zipped, drawings


def test_omniglot_by_what_it_contains(tiny_omniglot):
    zipped, drawings = tiny_omniglot
    found = omniglot.load("background", file=zipped())
    assert found.alphabets == ("A", "B", "B")
    assert found.characters == ("character01", "character01", "character02")
    assert found.drawings.shape == (3, 20, 105, 105)
    ink = drawings["images_background/B/character01/0003_07.png"][1]
    assert np.array_equal(found.drawings[1, 6].numpy(), 255 * ink)
    # every pixel of the small drawing is the mean of nine equal ones, but for Lanczos' overshoot
    small = omniglot.load("background", side=35, file=zipped()).drawings
    assert small.shape == (3, 20, 35, 35)
    assert ((small[1, 6].numpy() > 127) == ink[::3, ::3]).mean() > 0.99
    with pytest.raises(ConfigurationError, match="side must be at least 1"):
        omniglot.load("background", side=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"without": ["images_background/A/character01/0002_20.png"]}, "59 drawings of 3"),
        ({"content": {"images_background/A/character01/0002_20.png": b"junk"}}, "set.zip is not"),
    ],
)
def test_omniglot_that_is_not_whole(tiny_omniglot, changes, message):
    with pytest.raises(DataError, match=message):
        omniglot.load("background", file=tiny_omniglot[0](**changes))


def test_omniglot_that_is_no_zip_or_altered(tiny_omniglot, folder):
    file = tiny_omniglot[0]()
    content = bytearray((folder / "set.zip").read_bytes())
    content[content.index(b"IDAT") + 10] ^= 1
    for damaged in (bytes(content), bytes(content[:2000]), b""):
        (folder / "set.zip").write_bytes(damaged)
        with pytest.raises(DataError, match=r"set\.zip is not.*Replace it"):
            omniglot.load("background", file=file)


def pool(n=200, classes=10):
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([20.0, 80.0, 120.0])[:, None, None]
    pixels = (torch.rand(n, 3, 4, 4, generator=generator) * scale).to(torch.uint8)
    return Images(pixels, torch.arange(n) % classes)


def test_split_is_standardised_by_what_may_be_seen():
    parts = split(
        pool(), Images(pool().pixels // 2, pool().labels), samples=60, training=20, seed=1
    )
    seen = torch.cat([parts.train[0], parts.validation[0]]).double()
    assert len(seen) == 60
    assert seen.mean((0, 2, 3)).abs().max() < 1e-6
    assert (seen.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-6
    # half as bright: below the mean by half of it, and the test images had no say
    assert (parts.judges["test"][0].mean((0, 2, 3)) < -0.5).all()
    assert (parts.judges["test"][0].std((0, 2, 3)) - 0.5).abs().max() < 0.1


def test_other_images_are_standardised_likewise():
    """What a saved model does to the user's files is what training did to its own."""
    generator = torch.Generator().manual_seed(5)
    pool = Images(torch.randint(256, (40, 3, 4, 4), generator=generator), torch.arange(40) % 10)
    parts = split(pool, pool, samples=30, training=20, seed=0, dtype=torch.float64)
    assert parts.test is not None
    assert (parts.encoding.size, parts.encoding.channels) == (4, 3)
    torch.testing.assert_close(
        parts.encoding.encode(pool.pixels), parts.test[0], rtol=1e-12, atol=1e-12
    )


def test_split_draws_different_images_by_seed_and_none_twice():
    numbered = Images(torch.arange(200)[:, None, None, None].repeat(1, 1, 2, 2), torch.arange(200))
    parts = split(numbered, numbered, samples=150, training=50, seed=1)
    drawn = torch.cat([parts.train[1], parts.validation[1]])
    assert len(drawn.unique()) == 150
    again = split(numbered, numbered, samples=150, training=50, seed=1)
    assert torch.equal(parts.train[0], again.train[0])
    other = split(numbered, numbered, samples=150, training=50, seed=2)
    assert not torch.equal(parts.train[1], other.train[1])
    # labels go with their images
    order = parts.train[0][:, 0, 0, 0].argsort()
    assert torch.equal(parts.train[1][order], parts.train[1].sort().values)


@pytest.mark.parametrize(
    ("images", "samples", "training", "message"),
    [
        (pool(), 20, 0, "the training split would be empty: 0 of 20"),
        (pool(), 20, 20, "the validation split would be empty: 20 of 20"),
        (pool(), 201, 20, "201 images were asked for, and there are 200"),
        (pool(classes=1), 20, 5, "all 5 training images of seed 0 show class 0"),
        (Images(torch.zeros(9, 1, 2, 2), torch.arange(9)), 9, 3, "same value in every pixel"),
    ],
)
def test_splits_that_cannot_be(images, samples, training, message):
    with pytest.raises((ConfigurationError, DataError), match=message):
        split(images, images, samples=samples, training=training, seed=0)


@needs_data
def test_mnist_is_what_is_published():
    """Mean 0.1307 and deviation 0.3081 of its training pixels; 6,742 ones."""
    images = mnist.load()
    assert images.pixels.shape == (60000, 1, 28, 28)
    pixels = images.pixels.float() / 255
    assert pixels.mean().item() == pytest.approx(0.1307, abs=5e-5)
    assert pixels.std().item() == pytest.approx(0.3081, abs=5e-5)
    assert images.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert (images.labels == 1).sum() == 6742
    assert mnist.load(mnist.TEST).labels[:5].tolist() == [7, 2, 1, 0, 4]


@needs_data
def test_cifar10_is_what_is_published():
    """A thousand test images a class, and labels that begin with cat, ship, ship, airplane."""
    test = cifar10.load(cifar10.TEST)
    assert test.labels.bincount().tolist() == [1000] * 10
    assert test.labels[:4].tolist() == [3, 8, 8, 0]
    training = cifar10.load()
    assert training.pixels.shape == (len(training), 3, 32, 32)
    assert len(training) % 10000 == 0
    assert training.labels[:4].tolist() == [6, 9, 9, 4]
    # the mean of all 50,000 is 0.4914, 0.4822, 0.4465
    mean = training.pixels.float().mean((0, 2, 3)) / 255
    assert mean.tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=5e-3)


@needs_data
@pytest.mark.parametrize(("part", "alphabet"), [("evaluation", "Angelic")])
def test_omniglot_is_what_is_published(part, alphabet):
    found = omniglot.load(part, side=28)
    assert found.drawings.shape == (659, 20, 28, 28)
    assert len(set(found.alphabets)) == 20
    assert found.alphabets[0] == alphabet
    # strokes on paper: a few dark pixels, the corner white
    assert 0.8 < found.drawings.float().mean() / 255 < 0.97
