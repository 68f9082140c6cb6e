"""`RendezvousStore`: a store through which the processes of a model's ranks find the memory of each other's GPUs."""

import re
from collections.abc import Sequence
from datetime import timedelta

from torch._C import _distributed_c10d as c10d

_NUMBER = re.compile(r"(?<=SymmetricMemory/)\d+")
"""The number of an exchange, in the keys that PyTorch's symmetric memory uses: `CUDASymmetricMemory/<number>/<rank>`."""


class RendezvousStore(c10d.Store):
    """A file with keys and values, in which each process counts its exchanges from 0.

    PyTorch's symmetric memory counts the exchanges of a process over all its groups. Rank 0's process may have had engines
    before, while those of the other ranks are new. With its own count it would wait for keys that they never set.
    """

    def __init__(self, path: str, size: int, timeout: timedelta) -> None:
        """path: a file that does not exist at first. size: number of processes. timeout: of waiting for a key."""
        super().__init__()
        self._file = c10d.FileStore(path, size)
        self._file.set_timeout(timeout)
        self.set_timeout(timeout)
        self._numbers: dict[int, int] = {}

    def _key(self, key: str) -> str:
        found = _NUMBER.search(key)
        if found is None:
            return key
        # Not all numbers need to be this store's: two engines may start at the same time.
        number = self._numbers.setdefault(int(found.group()), len(self._numbers))
        return f"{key[: found.start()]}{number}{key[found.end() :]}"

    def set(self, key: str, value: str) -> None:
        self._file.set(self._key(key), value)

    def get(self, key: str) -> bytes:
        return self._file.get(self._key(key))

    def add(self, key: str, amount: int) -> int:
        return self._file.add(self._key(key), amount)

    def check(self, keys: Sequence[str]) -> bool:
        return self._file.check([self._key(key) for key in keys])

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        names = [self._key(key) for key in keys]
        if timeout is None:
            self._file.wait(names)
        else:
            self._file.wait(names, timeout)

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        return self._file.multi_get([self._key(key) for key in keys])
