"""What is to be settled, and by what it is judged: one kind of problem a file."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
