"""Regularisation strengths learned for every weight, on known data sets and on users' data."""
