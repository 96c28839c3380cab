"""Checks of a meta-gradient: references, contraction of maps, optimality of control."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
