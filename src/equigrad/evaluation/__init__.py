"""Where a meta-gradient is worked on: a problem at fixed meta-parameters, and its tally."""

from equigrad.evaluation.evaluation import (
    ANSWERED,
    FOR_MAPS,
    NO_STEP_SIZE,
    Evaluation,
    like,
    listed,
    no_loss,
)
from equigrad.evaluation.tally import Tally

__all__ = [
    "ANSWERED",
    "FOR_MAPS",
    "NO_STEP_SIZE",
    "Evaluation",
    "Tally",
    "like",
    "listed",
    "no_loss",
]
