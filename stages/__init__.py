"""The pipeline's stages, one click command each."""

import spec  # noqa: F401  before torch: it says how torch's threads wait
