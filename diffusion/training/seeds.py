"""Seeds for the parts of a training run."""

import hashlib


def seed_of(seed: int, purpose: str, index: int) -> int:
    """A 63-bit seed for one purpose and step of a run, independent of the seeds of all others."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
