"""Speculators for frozen language models: features, heads, training, acceptance, decoding."""

import os

# How long a thread of torch's on a CPU spins before it sleeps: 0.5 ms instead of libgomp's 15 ms, in which another
# program that wants the core waits, and all threads wait for it. libgomp reads it when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
