"""Decisions by hash: the same on every machine and whatever else there is."""

import hashlib


def in_fraction(content: bytes, fraction: float) -> bool:
    """Whether `content` is among the given fraction of all contents."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") < fraction * 2**64
