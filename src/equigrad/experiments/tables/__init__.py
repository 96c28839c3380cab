"""Tables that users bring: read from CSV, and encoded for a network."""
