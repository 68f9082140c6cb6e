"""`Leaves`: how a dimension of a layer is cut into parts whose boundaries the number of GPUs does not change. Free of torch."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise


@dataclass(frozen=True)
class Leaves:
    """Consecutive parts of a dimension, and which of them are here. They differ by one unit at most."""

    width: int
    """The whole dimension."""
    unit: int
    """Every leaf but the last ends at a multiple of this."""
    total: int
    """Leaves of the whole dimension."""
    first: int
    """The first leaf that is here."""
    count: int
    """How many are here."""

    @staticmethod
    def whole(width: int, unit: int, total: int) -> "Leaves":
        """All leaves of a dimension."""
        return Leaves(width, unit, total, 0, total)

    @property
    def units(self) -> int:
        """Units of the whole dimension, the last of which may not be full."""
        return -(-self.width // self.unit)

    @property
    def begin(self) -> int:
        """Where the leaves that are here begin."""
        return self._bound(self.first)

    @property
    def end(self) -> int:
        """Where the leaves that are here end."""
        return self._bound(self.first + self.count)

    @cached_property
    def spans(self) -> list[slice]:
        """Each leaf that is here, counted from `begin`."""
        bounds = [self._bound(self.first + leaf) - self.begin for leaf in range(self.count + 1)]
        return [slice(*pair) for pair in pairwise(bounds)]

    def _bound(self, leaf: int) -> int:
        return min(self.width, leaf * self.units // self.total * self.unit)
