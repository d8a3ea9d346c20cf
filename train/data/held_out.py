"""Which documents and files are held out for evaluation.

A hash decides it, so the choice is the same on every machine and does not depend on what other
documents there are.
"""

import hashlib


def is_document_held_out(text: str, fraction: float) -> bool:
    """Decides by a document's text alone, so that copies of it are all on the same side."""
    return _is_in_fraction(text.encode(), fraction)


def is_file_held_out(name: str, fraction: float) -> bool:
    """Decides by a file's relative name alone, so that it stays on its side if the folder moves."""
    return _is_in_fraction(name.encode("utf-8", "surrogateescape"), fraction)


def _is_in_fraction(content: bytes, fraction: float) -> bool:
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") < fraction * 2**64
