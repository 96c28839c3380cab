"""The papers' experiments, which use the library; they need the extra `experiments`."""
