"""Tasks, each a support and a query set, drawn in batches."""

from equigrad.tasks.batch import TaskBatch
from equigrad.tasks.classes import ClassCollection
from equigrad.tasks.classification import NWayKShot
from equigrad.tasks.learner import FewShotLearner
from equigrad.tasks.sampler import TaskSampler
from equigrad.tasks.sinusoid import Sinusoids, curves
from equigrad.tasks.splits import ClassSplit, check_disjoint, split_classes

__all__ = [
    "ClassCollection",
    "ClassSplit",
    "FewShotLearner",
    "NWayKShot",
    "Sinusoids",
    "TaskBatch",
    "TaskSampler",
    "check_disjoint",
    "curves",
    "split_classes",
]
