"""How a layer is divided among ranks."""

from dataclasses import dataclass

from orthrus.kernels.leaves import Leaves
from orthrus.kernels.ranks import Ranks


@dataclass(frozen=True)
class Split:
    """One rank's part of a layer."""

    ranks: Ranks
    """Those that have the other parts."""
    inputs: Leaves | None = None
    """The leaves of the inputs, of a layer whose inputs are divided. None for one whose outputs are."""

    first_output: int = 0
    """The output of the whole layer that is the first one here: in an LM head, a token."""

    @property
    def has_tree(self) -> bool:
        """Whether the layer's sum has several leaves."""
        return self.inputs is not None and self.inputs.total > 1
