"""`Leaves`: a dimension of a layer, cut into pieces that do not depend on the number of GPUs. Does not import torch.

These words describe how the sum over a layer's inputs is divided:

- A *step* is the inputs that a kernel multiplies in one iteration of its loop.
- A *leaf* is a run of steps with a sum of its own. The sums of neighbouring leaves are added, and so on up a binary tree (see
  `linear.tree`). So the leaves decide the bits of the result.
- A *part* is a run of leaves whose sum one program computes (split-K). It is a node of the tree, so the number of parts changes
  no bit. Layers with FP8 weights, or with scales for groups of inputs, are an exception: each of their parts is one leaf.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise


@dataclass(frozen=True)
class Leaves:
    """A dimension, cut into consecutive leaves, and which of these one rank has. Their sizes differ by one unit at most."""

    width: int
    """Size of the whole dimension."""
    unit: int
    """Every leaf but the last ends at a multiple of this."""
    total: int
    """Number of leaves of the whole dimension."""
    first: int
    """The rank's first leaf."""
    count: int
    """Number of the rank's leaves."""

    @staticmethod
    def whole(width: int, unit: int, total: int) -> "Leaves":
        """All leaves of a dimension, on one rank."""
        return Leaves(width, unit, total, 0, total)

    @property
    def units(self) -> int:
        """Units of the whole dimension, the last of which may not be full."""
        return -(-self.width // self.unit)

    @property
    def begin(self) -> int:
        """Where the rank's leaves begin."""
        return self._bound(self.first)

    @property
    def end(self) -> int:
        """Where the rank's leaves end."""
        return self._bound(self.first + self.count)

    @cached_property
    def spans(self) -> list[slice]:
        """Each of the rank's leaves, counted from `begin`."""
        bounds = [self._bound(self.first + leaf) - self.begin for leaf in range(self.count + 1)]
        return [slice(*pair) for pair in pairwise(bounds)]

    def _bound(self, leaf: int) -> int:
        return min(self.width, leaf * self.units // self.total * self.unit)
