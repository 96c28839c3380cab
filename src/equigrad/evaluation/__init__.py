"""Where a meta-gradient is worked on: a problem at fixed meta-parameters, on its stage."""

from equigrad.evaluation.evaluation import Evaluation
from equigrad.evaluation.phases import ANSWERED, FOR_MAPS, no_loss
from equigrad.evaluation.reaches import NO_STEP_SIZE, Reaches
from equigrad.evaluation.tally import Tally
from equigrad.evaluation.tensors import check_tensors, like

__all__ = [
    "ANSWERED",
    "FOR_MAPS",
    "NO_STEP_SIZE",
    "Evaluation",
    "Reaches",
    "Tally",
    "check_tensors",
    "like",
    "no_loss",
]
