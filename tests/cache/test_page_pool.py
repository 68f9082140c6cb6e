"""The owners of pages: sharing by name, forks, and the order of eviction."""

import random
import sys
import threading

from orthrus.cache.page_pool import PagePool


def name(text: str) -> bytes:
    return text.encode().ljust(16)


def test_page_0_is_never_handed_out_and_too_many_pages_are_refused() -> None:
    pool = PagePool(5)
    assert pool.allocate(5) is None
    assert sorted(pool.allocate(4) or []) == [1, 2, 3, 4]
    assert pool.allocate(1) is None
    assert pool.allocate(0) == []
    assert (pool.capacity, pool.used, pool.available) == (4, 4, 0)


def test_the_longest_known_prefix_is_shared_and_freed_pages_stay_findable() -> None:
    pool = PagePool(6)
    pages = pool.allocate(3) or []
    for page, text in zip(pages, "abc", strict=True):
        pool.name(page, name(text))
    assert pool.match([name("a"), name("b"), name("x"), name("c")]) == pages[:2]
    pool.release(pages)
    assert pool.used == 2
    pool.release(pages[:2])
    assert pool.used == 0
    assert pool.match([name(text) for text in "abc"]) == pages


def test_of_idle_pages_the_end_of_a_prefix_is_evicted_before_its_beginning() -> None:
    pool = PagePool(4)
    pages = pool.allocate(3) or []
    for page, text in zip(pages, "abc", strict=True):
        pool.name(page, name(text))
    pool.release(pages)
    assert pool.allocate(1) == pages[2:]
    assert pool.match([name(text) for text in "abc"]) == pages[:2]


def test_the_first_page_of_a_name_keeps_it() -> None:
    pool = PagePool(4)
    first, second = pool.allocate(2) or []
    pool.name(first, name("a"))
    pool.name(second, name("a"))
    pool.release([second])
    assert pool.match([name("a")]) == [first]


def test_without_prefix_caching_nothing_is_found() -> None:
    pool = PagePool(4, prefix_caching=False)
    [page] = pool.allocate(1) or []
    pool.name(page, name("a"))
    assert pool.match([name("a")]) == []


def test_no_page_is_lost_or_handed_out_twice() -> None:
    """Random allocations, names, matches and releases against a plain count of who has which page."""
    rng, pool = random.Random(0), PagePool(24)
    tables: list[list[int]] = []
    for step in range(4000):
        kind = rng.randrange(4)
        if kind == 0:
            owned = {page for table in tables for page in table}
            pages = pool.allocate(rng.randrange(1, 6))
            if pages is not None:
                assert not owned & set(pages)
                assert len(set(pages)) == len(pages)
                tables.append(pages)
        elif kind == 1 and tables:
            pool.name(rng.choice(rng.choice(tables)), name(str(rng.randrange(40))))
        elif kind == 2:
            tables.append(pool.match([name(str(rng.randrange(40))) for _ in range(3)]))
        elif tables:
            pool.release(tables.pop(rng.randrange(len(tables))))
        tables = [table for table in tables if table]
        assert pool.used == len({page for table in tables for page in table}), step
    for table in tables:
        pool.release(table)
    assert pool.used == 0
    assert sorted(pool.allocate(23) or []) == list(range(1, 24))


def test_any_thread_may_ask_for_the_names_while_they_change() -> None:
    pool = PagePool(101)
    names = [name(str(number)) for number in range(100)]
    for page, page_hash in zip(pool.allocate(100) or [], names, strict=True):
        pool.name(page, page_hash)
    stop = threading.Event()

    def change() -> None:
        rng = random.Random(1)
        while not stop.is_set():
            pool.release(pool.match([rng.choice(names)]))

    changing = threading.Thread(target=change)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    changing.start()
    try:
        for _ in range(2000):
            assert sorted(pool.recent(200)) == sorted(names)
    finally:
        stop.set()
        changing.join()
        sys.setswitchinterval(interval)
