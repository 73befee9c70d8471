"""Content-addressed, immutable segments of hidden states and answers, in Zarr."""
