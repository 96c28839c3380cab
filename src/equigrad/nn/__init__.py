"""Models whose parameters settle."""

from equigrad.nn.batch_statistics import BatchStatistics, ReferenceStatistics
from equigrad.nn.complex_synapse import ComplexSynapse
from equigrad.nn.equilibrium_layer import EquilibriumLayer
from equigrad.nn.equilibrium_network import EquilibriumNetwork
from equigrad.nn.equilibrium_rnn import EquilibriumRNN
from equigrad.nn.fourier_features import FourierFeatures
from equigrad.nn.functional import Functional
from equigrad.nn.hopfield import Hopfield
from equigrad.nn.learned_feedback import LearnedFeedback, with_learned_feedback
from equigrad.nn.learned_rates import LearnedRates
from equigrad.nn.learned_start import LearnedStart
from equigrad.nn.modulation import Modulation
from equigrad.nn.networks import conv4, lenet5, tanh_network
from equigrad.nn.relaxing import Relaxing
from equigrad.nn.residual_cell import ResidualCell
from equigrad.nn.side_by_side import SideBySide

__all__ = [
    "BatchStatistics",
    "ComplexSynapse",
    "EquilibriumLayer",
    "EquilibriumNetwork",
    "EquilibriumRNN",
    "FourierFeatures",
    "Functional",
    "Hopfield",
    "LearnedFeedback",
    "LearnedRates",
    "LearnedStart",
    "Modulation",
    "ReferenceStatistics",
    "Relaxing",
    "ResidualCell",
    "SideBySide",
    "conv4",
    "lenet5",
    "tanh_network",
    "with_learned_feedback",
]
