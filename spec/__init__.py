"""Speculators for frozen language models: features, heads, training, acceptance, decoding."""
