"""Where a meta-gradient is worked on: a problem at fixed meta-parameters, on its stage."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
