"""Strengths from one's own images: what a run leaves, what `predict` says, what is refused."""

import csv
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from equigrad.cli import main
from equigrad.experiments.data.image_folder import read_images
from equigrad.experiments.runs.model import load_model
from helpers import call_main

SMOKE = ["--scale", "smoke", "--size", "16", "--device", "cpu", "--no-compare"]


def paint(folder, kind, count, seed=0):
    """Noise, red for roses and green for leaves."""
    random = torch.Generator().manual_seed(seed)
    path = folder / kind
    path.mkdir(parents=True)
    for i in range(count):
        noise = torch.randint(0, 120, (20, 20, 3), generator=random, dtype=torch.uint8)
        noise[..., ["rose", "leaf"].index(kind)] += 100
        Image.frombytes("RGB", (20, 20), noise.numpy().tobytes()).save(path / f"{i}.png")


@pytest.fixture(scope="module")
def garden(tmp_path_factory):
    """Images, and a run on them."""
    folder = tmp_path_factory.mktemp("garden")
    for kind in ("rose", "leaf"):
        paint(folder / "images", kind, 15)
    words = ["run", "folder", "--images", folder / "images", *SMOKE, "--out", folder / "run"]
    words += ["--solver.lr", "0.05", "--solver.max-steps", "40"]
    main([str(word) for word in words])
    return folder


def test_run_leaves_a_model_that_predict_asks(garden, tmp_path, capsys):
    result = json.loads((garden / "run" / "result.json").read_text())
    assert (result["experiment"], set(result["metrics"])) == (
        "folder",
        {"validation_accuracy", "test_accuracy"},
    )
    assert (garden / "run" / "strengths.png").read_bytes().startswith(b"\x89PNG")
    model = load_model(garden / "run")
    assert model.target.outputs == 2
    main(["predict", str(garden / "run"), "--images", str(garden / "images")])
    out, err = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(out)))
    right = sum(f"/{row['prediction']}/" in row["file"] for row in rows)
    assert len(rows) == 30
    assert right >= 25
    assert f"accuracy {100 * right / 30:.4g} % on 30 with a known target" in err
    # what it says of an image depends on no other
    lonely = tmp_path / "lonely"
    lonely.mkdir()
    (lonely / "one.png").write_bytes((garden / "images" / "rose" / "3.png").read_bytes())
    main(["predict", str(garden / "run"), "--images", str(lonely)])
    out, err = capsys.readouterr()
    (one,) = csv.DictReader(io.StringIO(out))
    among = next(row for row in rows if row["file"].endswith("rose/3.png"))
    assert float(one["p(rose)"]) == pytest.approx(float(among["p(rose)"]), abs=1e-6)
    assert "target" not in err


def test_the_outermost_folder_names_the_class(garden, tmp_path, capsys):
    """As it does for a run: what is below it may be called as another class."""
    for nested in ("rose/2020", "rose/leaf"):
        (tmp_path / nested).mkdir(parents=True)
        whole = (garden / "images" / "rose" / "3.png").read_bytes()
        (tmp_path / nested / "a.png").write_bytes(whole)
    code, said = call_main("predict", garden / "run", "--images", tmp_path, capsys=capsys)
    assert code == 0
    assert "accuracy 100 % on 2 with a known target" in said
    # where none does, the folder that is asked about may name it
    code, said = call_main("predict", garden / "run", "--images", tmp_path / nested, capsys=capsys)
    assert (code, "accuracy 0 % on 1 with a known target" in said) == (0, True)
    (tmp_path / "b.png").write_bytes(whole)
    code, said = call_main("predict", garden / "run", "--images", tmp_path, capsys=capsys)
    assert (code, "accuracy 100 % on 2 with a known target" in said) == (0, True)
    assert "not scored" not in said


def test_images_of_a_test_folder_are_for_testing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for kind in ("rose", "leaf"):
        paint(tmp_path / "split" / "train", kind, 6)
        paint(tmp_path / "split" / "test", kind, 4, seed=1)
    words = ["run", "folder", "--images", "split", *SMOKE, "--gray", "--out", "run"]
    code, said = call_main(*words, capsys=capsys)
    assert code == 0
    assert "2 classes (leaf, rose); 6 training, 6 validation and 8 test images of split" in said
    assert "--test-share is not used: the images in split/test are for testing" in said


def test_broken_images_are_named_or_skipped(garden, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for kind in ("rose", "leaf"):
        paint(tmp_path / "images", kind, 5)
    broken = tmp_path / "images" / "rose" / "3.png"
    broken.write_bytes(broken.read_bytes()[:200])
    words = ["run", "folder", "--images", "images", *SMOKE, "--out"]
    code, said = call_main(*words, "run", capsys=capsys)
    assert (code, "1 of 10 images cannot be read: images/rose/3.png" in said) == (2, True)
    assert not (tmp_path / "run").exists()
    code, said = call_main(*words, "run", "--skip-broken", capsys=capsys)
    assert (code, "images/rose/3.png" in said) == (0, True)
    ask = ["predict", garden / "run", "--images", "images"]
    code, said = call_main(*ask, capsys=capsys)
    assert (code, "use --skip-broken" in said) == (2, True)
    code, said = call_main(*ask, "--skip-broken", capsys=capsys)
    assert (code, "on 9 with a known target" in said) == (0, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Missing from equigrad run folder: --images"),
        (["--images", "gone"], "gone is no folder of images"),
        (
            ["--images", "images", "--size", "8"],
            "a whole number of at least 16, got 8",
        ),
        (
            ["--images", "images", "--samples", "50"],
            "50 samples were requested, but there are only",
        ),
    ],
)
def test_wrong_words_end_with_code_2(garden, monkeypatch, capsys, words, message):
    monkeypatch.chdir(garden)
    code, said = call_main("run", "folder", "--scale", "smoke", *words, capsys=capsys)
    assert code == 2
    assert message in said


def test_models_know_what_they_learned_from(garden, tmp_path, capsys):
    (tmp_path / "table.csv").write_text("a\n1\n")
    code, said = call_main(
        "predict", garden / "run", "--csv", tmp_path / "table.csv", capsys=capsys
    )
    assert (code, "was trained on images; use it with --images DIR" in said) == (2, True)
    code, said = call_main("predict", garden / "run", "--images", tmp_path, capsys=capsys)
    assert (code, "contains no images" in said) == (2, True)


def test_gray_images_of_16_bits_are_read_as_of_8(tmp_path):
    values = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(257 * values).save(tmp_path / "deep.png")
    Image.fromarray(values.astype(np.uint8)).save(tmp_path / "plain.png")
    files = [tmp_path / "deep.png", tmp_path / "plain.png"]
    pixels, _, broken = read_images(files, size=16, channels=1)
    assert broken == []
    assert torch.equal(pixels[0], pixels[1])
    assert pixels.max() == 255
