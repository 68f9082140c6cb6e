"""Corrects measured costs by the times that passes take while the engine works.

Costs are measured once, with one context length and on an idle engine. They may be wrong later: contexts are longer, or the
machine is busier. So each kind of pass has a factor. It moves by small steps towards the median of observed over measured times.
A few passes that were held up by something else hardly move it.

What slows one kind of pass down mostly slows down the others too, and planners compare kinds. So the larger part of each step
goes to all kinds, and the smaller part to the observed kind alone. A kind that has not run for long keeps up with the others.
"""

from collections.abc import Mapping

from orthrus.schedules.pass_cost import PassCost

_SHARED_STEP, _OWN_STEP = 1.004, 1.002
"""By what one pass multiplies or divides the factors of all kinds, and the factor of its own kind once more."""
_NOTED = 1.03
"""By how much a factor must have changed before planners see the new factors."""
_MOST = 4.0
"""The largest factor of all kinds or of one kind, and the inverse of the smallest."""


class PassFactors:
    """The factor of each kind of pass."""

    def __init__(self, costs: Mapping[str, PassCost]) -> None:
        """costs: as measured, by kind."""
        self._costs = costs
        self._shared = 1.0
        self._own = dict.fromkeys(costs, 1.0)
        self._seen = dict.fromkeys(costs, 1.0)
        self.version = 0
        """Grows whenever the factors that planners see change."""

    def __getitem__(self, kind: str) -> float:
        """By what to multiply the measured cost of passes of this kind."""
        return self._seen[kind]

    def observe(self, kind: str, size: int, sequences: int, seconds: float) -> None:
        """Count the time of a pass. size, sequences: as for `PassCost`. Kinds that have no cost are ignored."""
        if (cost := self._costs.get(kind)) is None:
            return
        direction = 1 if seconds > self._shared * self._own[kind] * cost(size, sequences) else -1
        self._shared = _limited(self._shared * _SHARED_STEP**direction)
        self._own[kind] = _limited(self._own[kind] * _OWN_STEP**direction)
        factors = {each: self._shared * own for each, own in self._own.items()}
        if not all(1 / _NOTED < factors[each] / seen < _NOTED for each, seen in self._seen.items()):
            self._seen = factors
            self.version += 1


def _limited(factor: float) -> float:
    return min(_MOST, max(1 / _MOST, factor))
