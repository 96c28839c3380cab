"""Adapt what few-shot learning has learned to your own images, and ask it about others.

    equigrad run omniglot --out runs/mine
    python examples/adapt_to_your_images.py runs/mine KNOWN ASKED

KNOWN has a subfolder of a few images for every class, KNOWN/CLASS/*.png; ASKED has the images to
classify, in whatever subfolders. Only the task itself is learned here, which takes a moment.
"""

import argparse
from pathlib import Path

import torch

from equigrad.errors import DataError, EquigradError
from equigrad.experiments.data.image_folder import find, read_images
from equigrad.experiments.few_shot.image_classes import image_folder
from equigrad.experiments.few_shot.omniglot import Omniglot
from equigrad.experiments.runs.config_file import read_config


def adapt(run: Path, known: Path, asked: Path) -> dict[Path, str]:
    """The class of every image in `asked`, as a learner sees it that has seen those in `known`."""
    learner, meta_params = Omniglot.load_learner(run)
    config = read_config(run / "config.json", Omniglot.preset, {})
    channels = 3 if config.colors else 1
    inverted = config.images is None  # Omniglot's ink is 1, its paper 0

    classes = image_folder(known, size=config.side, channels=channels, inverted=inverted)
    if len(classes) > config.way:
        raise DataError(
            f"{known} has {len(classes)} classes, and {run} has learned to tell {config.way} "
            f"apart; leave some out, or start a run with --way {len(classes)}"
        )
    inputs = torch.cat(list(classes))
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(c) for c in classes]))

    # with statistics of the support set, what is said of an image depends on no other
    model = learner.adapt(meta_params, (inputs, labels), statistics="support")

    pixels, files, broken = read_images(find(asked), size=config.side, channels=channels)
    if broken or not files:
        raise DataError("\n".join(broken) or f"{asked} has no images")
    images = pixels.float() / 255
    with torch.no_grad():
        outputs = model(1 - images if inverted else images)[:, : len(classes)]
    answers = [classes.names[i] for i in outputs.argmax(-1).tolist()]
    return dict(zip(files, answers, strict=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run of `equigrad run omniglot`")
    parser.add_argument("known", type=Path, help="a subfolder of a few images for every class")
    parser.add_argument("asked", type=Path, help="images to classify")
    words = parser.parse_args()
    try:
        for file, answer in adapt(words.run, words.known, words.asked).items():
            print(f"{file}: {answer}")
    except EquigradError as error:
        raise SystemExit(f"error: {error}") from None
