"""Side-by-side measurements; each is a command that prints a table."""

import spec  # noqa: F401  before torch: it says how torch's threads wait
