"""Evaluations of a problem at fixed meta-parameters: phases, derivatives, module state, counts."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
