"""Training heads from cached features."""
