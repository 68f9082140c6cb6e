"""`PagePool`: who owns which page of the KV cache.

A page holds `page_size` consecutive positions of one sequence in all layers. Full pages of committed positions are named by a
hash of all tokens up to their end, so that a later request with the same prefix takes them over. Sharing is exact:
keys and values of a position are the same bits however they were computed.
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice

from orthrus.cache.page_hash import PageHash


class PagePool:
    """Hands out pages 1 to num_pages - 1, counts who owns each, and keeps freed named pages until space is short."""

    def __init__(self, num_pages: int, prefix_caching: bool = True) -> None:
        self._prefix_caching = prefix_caching
        self._free = list(range(num_pages - 1, 0, -1))
        self._owners = [0] * num_pages
        # Named pages, least recently named or matched first.
        self._by_hash: OrderedDict[PageHash, int] = OrderedDict()
        self._hash_of: dict[int, PageHash] = {}
        # Named pages that nobody owns, least recently used first.
        self._idle: OrderedDict[int, None] = OrderedDict()
        self.capacity = num_pages - 1
        self.promised = 0
        """Pages that the running sequences may need for the next pass. The scheduler keeps count."""

    @property
    def available(self) -> int:
        """Pages that `allocate` can hand out, idle named ones included."""
        return len(self._free) + len(self._idle)

    @property
    def spare(self) -> int:
        """Pages that may be taken for drafts: those that the next pass does not need for what it computes anyway."""
        return max(0, self.available - self.promised)

    @property
    def used(self) -> int:
        """Pages that some sequence owns."""
        return self.capacity - self.available

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages of the caller's own, or None when there are too few; evicts the idle pages used longest ago."""
        if count > self.available:
            return None
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._idle.popitem(last=False)
                del self._by_hash[self._hash_of.pop(page)]
            self._owners[page] = 1
            pages.append(page)
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Give up ownership. Pages are idled last first: of a prefix, its end is evicted before its beginning."""
        for page in reversed(pages):
            self._owners[page] -= 1
            if self._owners[page] == 0:
                if page in self._hash_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def name(self, page: int, page_hash: PageHash) -> None:
        """Make a full page of committed positions findable. The first page of a name keeps it."""
        if self._prefix_caching and page not in self._hash_of and page_hash not in self._by_hash:
            self._by_hash[page_hash] = page
            self._hash_of[page] = page_hash

    def match(self, hashes: Sequence[PageHash]) -> list[int]:
        """Pages of the longest known prefix, now shared with the caller."""
        pages = []
        for page_hash in hashes:
            page = self._by_hash.get(page_hash)
            if page is None:
                break
            self._owners[page] += 1
            self._idle.pop(page, None)
            self._by_hash.move_to_end(page_hash)
            pages.append(page)
        return pages

    def recent(self, limit: int) -> list[PageHash]:
        """Names of the pages that were named or matched last, newest first. Any thread may ask."""
        while True:
            try:
                return list(islice(reversed(self._by_hash), limit))
            except RuntimeError:
                # The engine's thread has changed the names meanwhile, as it does a few times a pass.
                continue
