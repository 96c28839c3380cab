"""Data sets that experiments read from a folder or download."""
