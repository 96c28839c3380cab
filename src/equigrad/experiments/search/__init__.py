"""Hyperparameter searches with Ray Tune."""
