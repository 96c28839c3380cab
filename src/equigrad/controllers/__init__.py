"""How a learner is led to where its outer loss is small: one controller a file."""

from equigrad.controllers.controller import Controlled, Controller
from equigrad.controllers.dynamic_inversion import DynamicInversion
from equigrad.controllers.energy_inversion import EnergyInversion
from equigrad.controllers.feedback_learning import learn_feedback
from equigrad.controllers.linear_feedback import LinearFeedback

__all__ = [
    "Controlled",
    "Controller",
    "DynamicInversion",
    "EnergyInversion",
    "LinearFeedback",
    "learn_feedback",
]
