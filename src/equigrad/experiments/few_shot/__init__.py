"""Few-shot learning: sinusoids, Omniglot, or classes of your own."""
