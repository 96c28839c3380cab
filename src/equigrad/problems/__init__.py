"""Kinds of bilevel problem: what settles in the inner problem, and the outer loss."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
