"""The papers' theory on problems with known answers: error bounds, accuracy, matched phases."""
