"""Names of cache pages: equal for equal prefixes, on every replica and in the request router.

It imports nothing of the model, so that whoever routes requests can name pages too.
"""

import hashlib
from array import array
from collections.abc import Sequence

PageHash = bytes


def page_hashes(tokens: Sequence[int], page_size: int, known: Sequence[PageHash] = ()) -> list[PageHash]:
    """Hashes of the full pages of `tokens`, continuing from those of its first pages where they are known."""
    hashes = list(known)
    for end in range((len(hashes) + 1) * page_size, len(tokens) + 1, page_size):
        digest = hashlib.blake2b(hashes[-1] if hashes else b"", digest_size=16)
        digest.update(array("q", tokens[end - page_size : end]).tobytes())
        hashes.append(digest.digest())
    return hashes
