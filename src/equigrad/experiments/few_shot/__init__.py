"""Few-shot learning: sine curves, Omniglot, or users' own classes of images."""
