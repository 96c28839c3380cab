"""Models whose parameters settle."""

from equigrad.nn.complex_synapse import ComplexSynapse
from equigrad.nn.functional import Functional
from equigrad.nn.networks import lenet5, tanh_network

__all__ = ["ComplexSynapse", "Functional", "lenet5", "tanh_network"]
