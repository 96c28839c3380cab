"""The papers' experiments, beside the library; they need the extra `experiments`."""
