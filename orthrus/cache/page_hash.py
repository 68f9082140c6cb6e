"""Hashes of cache pages. Equal prefixes have equal hashes, on every replica and in the request router.

This file imports nothing of the model, so that the request router can use it.
"""

import hashlib
from array import array
from collections.abc import Sequence

PageHash = bytes


def page_hashes(
    tokens: Sequence[int],
    page_size: int,
    known: Sequence[PageHash] = (),
    *,
    end: int | None = None,
    salt: str = "",
) -> list[PageHash]:
    """The hashes of the full pages of `tokens`. known: those of its first pages, which are not computed again.

    end: how many of the tokens count; None for all. salt: prefixes with different salts have no hash in common.
    """
    hashes = list(known)
    root = hashlib.blake2b(salt.encode(errors="surrogatepass"), digest_size=16).digest() if salt else b""
    end = len(tokens) if end is None else end
    for behind in range((len(hashes) + 1) * page_size, end + 1, page_size):
        digest = hashlib.blake2b(hashes[-1] if hashes else root, digest_size=16)
        digest.update(array("q", tokens[behind - page_size : behind]).tobytes())
        hashes.append(digest.digest())
    return hashes
