"""What holds an estimator to its word: problems with known answers, and a suite over them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
