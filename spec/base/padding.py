"""The lengths to which sequences are padded."""

BUCKET = 64
"""Sequences are padded to a multiple of this: a bf16 result depends on the padded length, so it must follow from
the sequence alone and never from what shares its batch."""


def bucket(length: int) -> int:
    """The padded length of a sequence of `length` tokens."""
    return -(-length // BUCKET) * BUCKET


def prompt_bucket(length: int) -> int:
    """The padded length of a prompt to be answered: a power of two, so that rare long prompts share a batch.

    A batch costs nearly the same for few rows as for many while it writes, and padding costs only its prefill.
    """
    return max(BUCKET, 1 << (length - 1).bit_length())
