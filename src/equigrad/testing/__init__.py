"""A zoo of problems with known gradients, and a conformance suite for estimators."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
