"""Few-shot tasks, each with a support and a query set, drawn in batches."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
