"""The characters of Omniglot, divided into those for meta-training, validation and meta-test.

Rotations are made by the sampler out of what a part holds, so that all turns of a character are on
its side: `NWayKShot(split.train, rotations=True)`.
"""

from dataclasses import replace
from functools import cache
from typing import Literal, get_args

import torch

from equigrad.errors import ConfigurationError
from equigrad.experiments.data import omniglot_archives as drawings
from equigrad.tasks.classes import ClassCollection
from equigrad.tasks.splits import ClassSplit, draw_classes, split_classes

SplitName = Literal["background-evaluation", "1100-100-423"]

HELD_OUT = 100
"""Default number of characters for validation."""


def omniglot(
    split_name: SplitName = "background-evaluation",
    *,
    side: int = 28,
    held_out: int = HELD_OUT,
    seed: int = 0,
) -> ClassSplit:
    """All 1,623 characters with 20 drawings each, for meta-training, validation and meta-test.

    - `background-evaluation`: Lake et al. 2015's own parts. The 659 characters of the evaluation
      alphabets are the meta-test, in their order. Of the 964 background characters, `held_out` are
      for validation. Zucchet et al. 2022 learned from all 964 and had no validation: `held_out=0`.
    - `1100-100-423`: all characters together, divided at random; the alphabets are on all sides.
      The sizes are those of learn2learn, the draw is our own. With `held_out=0` the 100 are left
      aside.

    Args:
        split_name: which division.
        side: height and width of a drawing.
        held_out: characters for validation: any number of the background, or 0 for none.
        seed: draws which characters are for what; keep it while the seed of a run changes.

    Returns:
        The parts, drawings 20 × 1 × side × side a character, from 0 (paper) to 1 (ink).

    Raises:
        ConfigurationError: an unknown division, or one without validation or meta-training.
        DataError: as `equigrad.experiments.data.omniglot_archives.load`.
    """
    if split_name not in get_args(SplitName):
        raise ConfigurationError(
            f"split_name must be one of {', '.join(map(repr, get_args(SplitName)))}, "
            f"got {split_name!r}"
        )
    if split_name == "1100-100-423":
        if held_out not in (0, HELD_OUT):
            raise ConfigurationError(
                f"{split_name} has {HELD_OUT} characters for validation, and held_out asks for "
                f"{held_out}; take {HELD_OUT}, 0 for none, or 'background-evaluation'"
            )
        everything = _characters("background", "evaluation", side=side)
        split = split_classes(everything, train=1100, validation=HELD_OUT, test=423, seed=seed)
        note = f"Omniglot {split_name}: {split.note}"
        if held_out == 0:
            return replace(split, validation=None, note=f"{note}; validation is left aside")
        return replace(split, note=note)
    background = _characters("background", side=side)
    if not 0 <= held_out < len(background):
        raise ConfigurationError(
            f"held_out must be from 0 to {len(background) - 1}, some of the {len(background)} "
            f"background characters, got {held_out}"
        )
    counts = (len(background) - held_out, held_out)
    learned, validation = draw_classes(background, counts, seed=seed)
    test = _characters("evaluation", side=side)
    return ClassSplit(
        train=learned,
        validation=validation if held_out else None,
        test=test,
        note=(
            f"Omniglot {split_name}: {len(learned)} classes for meta-training, {held_out} of the "
            f"background for validation, {len(test)} for the meta-test, seed {seed}"
        ),
    )


@cache  # read once, whatever the seeds of the splits
def _characters(*parts: drawings.AlphabetSet, side: int) -> ClassCollection:
    found = [drawings.load(part, side=side) for part in parts]
    pixels = torch.cat([part.drawings for part in found])
    return ClassCollection(
        1 - pixels[:, :, None].float() / 255,
        tuple(
            f"{alphabet}/{character}"
            for part in found
            for alphabet, character in zip(part.alphabets, part.characters, strict=True)
        ),
    )
