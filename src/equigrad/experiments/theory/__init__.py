"""Reproductions of the theory on problems with known answers: bounds, accuracy, matched phases."""
