"""How a layer is divided among ranks."""

from dataclasses import dataclass

from orthrus.kernels.leaves import Leaves
from orthrus.kernels.ranks import Ranks


@dataclass(frozen=True)
class Split:
    """One rank's part of a layer."""

    ranks: Ranks
    """The ranks among which the layer is divided."""
    inputs: Leaves | None = None
    """The rank's leaves of the inputs, if the inputs are divided (row parallel). None if the outputs are (column parallel)."""

    first_output: int = 0
    """Index, in the whole layer, of the rank's first output. In an LM head it is a token."""

    @property
    def has_tree(self) -> bool:
        """Whether the layer's sum has several leaves."""
        return self.inputs is not None and self.inputs.total > 1
