"""The pipeline's stages, one click command each."""
