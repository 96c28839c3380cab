"""The papers' experiments, one a file; they need the extra `experiments`."""
