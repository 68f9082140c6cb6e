"""`PagePool`: the owners of each page of the KV cache.

A page holds `page_size` consecutive positions of one sequence in all layers. A full page of committed positions gets a name: a
hash of all tokens up to its end. A later request with the same prefix finds the page by this hash, and shares it. Sharing is
exact: keys and values of a position have the same bits however they were computed.
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice

from orthrus.cache.page_hash import PageHash


class PagePool:
    """Hands out pages 1 to num_pages - 1 and counts their owners. Named pages without owners are kept until space is short."""

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
        """Pages that the running sequences may need for the next pass. The scheduler sets it."""

    @property
    def available(self) -> int:
        """Pages that `allocate` can hand out, idle named ones included."""
        return len(self._free) + len(self._idle)

    @property
    def spare(self) -> int:
        """Pages that trees of drafts may take: those that running sequences do not need for the next pass."""
        return max(0, self.available - self.promised)

    @property
    def used(self) -> int:
        """Pages that some sequence owns."""
        return self.capacity - self.available

    def allocate(self, count: int) -> list[int] | None:
        """Allocate `count` pages, or return None if there are too few. Evicts idle pages, the least recently used first."""
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
        """Give up ownership. The last page becomes idle first, so that the end of a prefix is evicted before its beginning."""
        for page in reversed(pages):
            self._owners[page] -= 1
            if self._owners[page] == 0:
                if page in self._hash_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def name(self, page: int, page_hash: PageHash) -> None:
        """Name a full page of committed positions by its hash. Does nothing if another page has this name already."""
        if self._prefix_caching and page not in self._hash_of and page_hash not in self._by_hash:
            self._by_hash[page_hash] = page
            self._hash_of[page] = page_hash

    def match(self, hashes: Sequence[PageHash]) -> list[int]:
        """The pages of the longest prefix that is cached. The caller becomes an owner of them."""
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
        """Names of the `limit` pages that were named or matched last, newest first. Any thread may call it."""
        while True:
            try:
                return list(islice(reversed(self._by_hash), limit))
            except RuntimeError:
                # The engine's thread has changed the names meanwhile, as it does a few times a pass.
                continue
