from .controller import Controlled as Controlled
from .controller import Controller as Controller
from .dynamic_inversion import DynamicInversion as DynamicInversion
from .energy_inversion import EnergyInversion as EnergyInversion
from .feedback_learning import learn_feedback as learn_feedback
from .linear_feedback import LinearFeedback as LinearFeedback
