"""Omniglot's divisions: what each part holds, and that none of it is on two sides."""

import json
import os
from functools import cache
from typing import get_args

import pytest
import torch

from equigrad.errors import ConfigurationError
from equigrad.experiments.data import omniglot_archives as drawings
from equigrad.experiments.data.files import FOLDER
from equigrad.experiments.few_shot.omniglot_classes import SplitName, omniglot
from equigrad.tasks import NWayKShot
from helpers import call_main

needs_data = pytest.mark.skipif(
    FOLDER not in os.environ, reason=f"{FOLDER} names no folder with the images"
)


@pytest.fixture
def made_up_characters(monkeypatch):
    """As many characters as there are, of few pixels; which of them was asked for."""

    def load(part, *, side):
        count = drawings.CHARACTERS[part]
        pixels = torch.full((count, 20, side, side), 255, dtype=torch.uint8)
        pixels[..., 0, 0] = 0
        names = tuple(f"character{c:03}" for c in range(count))
        return drawings.Drawings(pixels, (part,) * count, names)

    monkeypatch.setattr(drawings, "load", load)


@pytest.fixture(scope="module")
def read_once():
    """The real drawings, which take seconds to read."""
    return cache(drawings.load)


def sizes(split):
    return {name: len(part) for name, part in split.parts.items()}


@pytest.mark.usefixtures("made_up_characters")
@pytest.mark.parametrize("scale", ["paper", "smoke"])
@pytest.mark.parametrize("split", get_args(SplitName))
def test_every_split_runs_at_every_scale(scale, split, tmp_path, capsys):
    short = ["--side", 16, "--filters", 2, "--tasks", 1, "--outer-steps", 1, "--threads", 1]
    short += ["--solver.max-steps", 1, "--nudged-steps", 1, "--test-steps", 1, "--test-tasks", 2]
    words = ["--scale", scale, "--split", split, *short, "--out", tmp_path / "run"]
    code, said = call_main("run", "omniglot", *words, capsys=capsys)
    assert code == 0, said
    assert f"Omniglot {split}: " in said
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    assert ("validation_accuracy" in metrics) == (scale != "paper")


@pytest.mark.usefixtures("made_up_characters")
def test_parts_are_as_their_name_says():
    split = omniglot(side=4)
    assert sizes(split) == {"train": 864, "validation": 100, "test": 659}
    origins = {part: {n.split("/")[0] for n in own.names} for part, own in split.parts.items()}
    assert origins == {
        "train": {"background"},
        "validation": {"background"},
        "test": {"evaluation"},
    }
    assert split.note == (
        "Omniglot background-evaluation: 864 classes for meta-training, 100 of the background for "
        "validation, 659 for the meta-test, seed 0"
    )
    assert sizes(omniglot(side=4, held_out=0)) == {"train": 964, "test": 659}
    assert omniglot(side=4, held_out=0).validation is None
    mixed = omniglot("1100-100-423", side=4)
    assert sizes(mixed) == {"train": 1100, "validation": 100, "test": 423}
    assert mixed.note.startswith("Omniglot 1100-100-423: 1100 classes for meta-training, 100 for")
    whole = omniglot("1100-100-423", side=4, held_out=0)
    assert sizes(whole) == {"train": 1100, "test": 423}
    assert (whole.train.names, whole.test.names) == (mixed.train.names, mixed.test.names)
    assert whole.note == f"{mixed.note}; validation is left aside"
    # by chance, 964 / 1623 of every part are of the background
    for part in mixed.parts.values():
        share = sum(name.startswith("background") for name in part.names) / len(part)
        assert abs(share - 964 / 1623) < 0.15


@pytest.mark.usefixtures("made_up_characters")
def test_ink_is_one_and_paper_zero():
    image = omniglot(side=4).train[0][0]
    assert image.shape == (1, 4, 4)
    assert image[0, 0, 0] == 1
    assert image.sum() == 1


@pytest.mark.usefixtures("made_up_characters")
def test_the_seed_draws_what_is_held_out():
    def held_out(seed):
        return omniglot(side=4, seed=seed).parts["validation"].names

    assert held_out(0) == held_out(0)
    assert held_out(0) != held_out(1)


@needs_data
@pytest.mark.parametrize("name", ["background-evaluation", "1100-100-423"])
def test_no_drawing_of_the_meta_test_is_learned_from_in_any_turn(name, read_once, monkeypatch):
    """By what the drawings show, not by what they are called."""
    monkeypatch.setattr(drawings, "load", read_once)
    split = omniglot(name)
    learned = NWayKShot(split.train, rotations=True)._pool[0]
    assert len(learned) == 4 * 20 * len(split.train)

    def fingerprints(images):
        rows = (255 * images.flatten(-3).flatten(0, -2)).round().byte().numpy()
        return {row.tobytes() for row in rows}

    seen = fingerprints(learned)
    for part in ("validation", "test"):
        held_out = fingerprints(split.parts[part].examples)
        assert len(held_out) == 20 * len(split.parts[part])  # it tells one drawing from another
        assert not held_out & seen


@needs_data
def test_drawings_are_strokes_on_paper(read_once, monkeypatch):
    monkeypatch.setattr(drawings, "load", read_once)
    split = omniglot()
    batch = NWayKShot(split.test, way=20, shot=5).sample(2, draw=0)
    assert batch.support[0].shape == (2, 100, 1, 28, 28)
    assert 0.03 < batch.support[0].mean() < 0.2  # thin strokes
    assert batch.support[0].amin() == 0
    assert batch.support[0].amax() > 0.9


@pytest.mark.usefixtures("made_up_characters")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"split_name": "vinyals"},
            "one of 'background-evaluation', '1100-100-423', got 'vinyals'",
        ),
        ({"held_out": 964}, "held_out must be from 0 to 963.*got 964"),
        ({"held_out": -1}, "held_out must be from 0 to 963.*got -1"),
        ({"split_name": "1100-100-423", "held_out": 50}, "has 100 characters .*asks for 50"),
    ],
)
def test_divisions_that_cannot_be(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        omniglot(**arguments)


def test_drawings_of_no_pixels_are_refused():
    with pytest.raises(ConfigurationError, match="side must be at least 1, got 0"):
        omniglot(side=0)
