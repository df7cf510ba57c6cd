"""Seeds that are functions of what they are for."""

import hashlib


def stable_seed(*parts: object) -> int:
    """Return a 63-bit seed that is a pure function of ``parts``."""
    digest = hashlib.blake2b("|".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
