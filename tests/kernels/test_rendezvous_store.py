"""Processes find each other's keys, however many exchanges each has counted before."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from torch._C import _distributed_c10d as c10d

from orthrus.kernels.ranks.rendezvous_store import RendezvousStore

SIZE = 3


def exchange(path: str, rank: int, counted: int, each: int) -> list[list[bytes]]:
    """What PyTorch's symmetric memory does, through C++: each rank sets a key and reads those of all, several times.

    counted: exchanges before. each: by how many the count rises, as other engines of the process count too.
    """
    store = RendezvousStore(path, SIZE, timedelta(seconds=20))
    outer = c10d.PrefixStore(path, store)
    found = []
    for number in range(3):
        keys = [f"CUDASymmetricMemory/{counted + number * each}/{other}" for other in range(SIZE)]
        outer.set(keys[rank], f"{rank} {number}")
        outer.wait(keys)
        assert outer.check(keys)
        found += [[outer.get(key) for key in keys], outer.multi_get(keys)]
    # A barrier: each adds 1 to a key, until it is as many as there are ranks.
    barrier = f"CUDASymmetricMemory/{counted + 3 * each}"
    outer.add(barrier, 1)
    while outer.add(barrier, 0) < SIZE:
        time.sleep(0.01)
    return found


def test_ranks_that_have_counted_differently_find_each_other(tmp_path: Path) -> None:
    path = str(tmp_path / "2026")
    with ThreadPoolExecutor(SIZE) as threads:
        results = list(threads.map(exchange, [path] * SIZE, range(SIZE), [17, 0, 5], [2, 1, 1]))
    expected = [[f"{rank} {number}".encode() for rank in range(SIZE)] for number in range(3)]
    assert results == [[row for row in expected for _ in range(2)]] * SIZE


def test_a_rank_that_does_not_come_is_not_waited_for_without_end(tmp_path: Path) -> None:
    store = RendezvousStore(str(tmp_path / "ranks"), 2, timedelta(milliseconds=50))
    with pytest.raises(RuntimeError, match=r"(?i)timeout"):
        store.wait(["CUDASymmetricMemory/0/1"])
