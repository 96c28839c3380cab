"""How the gradient of θ is had: one estimator a file, all behind `equigrad.meta_gradient`."""

from equigrad.estimators.contrastive import Contrastive
from equigrad.estimators.estimator import Estimate, Estimator
from equigrad.estimators.t1t2 import T1T2

__all__ = ["T1T2", "Contrastive", "Estimate", "Estimator"]
