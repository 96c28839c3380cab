"""Experiments on networks that settle: equilibrium propagation, implicit layers, least control."""
