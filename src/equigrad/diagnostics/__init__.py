"""Is this meta-gradient right, and if not, why: re-solving, contraction, optimality."""
