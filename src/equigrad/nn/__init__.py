"""Models whose parameters settle."""

from equigrad.nn.complex_synapse import ComplexSynapse
from equigrad.nn.functional import Functional

__all__ = ["ComplexSynapse", "Functional"]
