"""Corrects measured costs by the times that passes take while the engine works.

Costs are measured once, with one context and on an engine without work. They may be wrong later: contexts are longer, or the
machine was busy when the engine started. So each kind of pass has a factor. It moves by small steps towards the median of
observed over measured times: a few passes that were held up by something else hardly move it.
"""

from collections.abc import Mapping

from orthrus.schedules.pass_cost import PassCost

_STEP = 1.005
"""By what a pass moves the factor of its kind."""
_NOTED = 1.03
"""By how much a factor must have changed before planners are told."""
_MOST = 4.0
"""The largest factor, and the inverse of the smallest."""


class PassFactors:
    """The factor of each kind of pass."""

    def __init__(self, costs: Mapping[str, PassCost]) -> None:
        """costs: as measured, by kind."""
        self._costs = costs
        self._factors = dict.fromkeys(costs, 1.0)
        self._told = dict(self._factors)
        self.version = 0
        """Grows whenever a factor changes."""

    def __getitem__(self, kind: str) -> float:
        """What the measured cost of passes of this kind is to be multiplied by."""
        return self._told[kind]

    def observe(self, kind: str, size: int, sequences: int, seconds: float) -> None:
        """Note what a pass took. size, sequences: as for `PassCost`. Kinds that have no cost are ignored."""
        if (cost := self._costs.get(kind)) is None:
            return
        factor = self._factors[kind]
        longer = seconds > factor * cost(size, sequences)
        factor = min(_MOST, max(1 / _MOST, factor * _STEP if longer else factor / _STEP))
        self._factors[kind] = factor
        if not 1 / _NOTED < factor / self._told[kind] < _NOTED:
            self._told[kind] = factor
            self.version += 1
