"""Real data sets, read from a folder or fetched."""
