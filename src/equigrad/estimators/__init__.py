"""How the gradient of θ is had: one estimator a file, all behind `equigrad.meta_gradient`."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
