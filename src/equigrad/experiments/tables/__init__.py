"""Tables of your own, read from CSV and encoded for a network."""
