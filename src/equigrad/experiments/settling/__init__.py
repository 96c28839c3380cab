"""Networks that settle: equilibrium propagation, implicit layers, least control."""
