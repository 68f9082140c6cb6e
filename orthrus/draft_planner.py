"""How many rows a draft block is worth: expected tokens per second under measured costs and measured acceptance.

A cycle of K rows costs two passes of batch * K rows and commits 1 + sum over d < K of P(the first d drafts are accepted) tokens a
sequence; an AR step costs one pass of batch rows and commits one. The planner takes the K with the best rate, 1 included,
which is what keeps Orthrus from being slower than AR where rows are dear. Its choice never changes the text.
"""

from orthrus.pass_cost import DecodeCost

_PRIOR_ACCEPTANCE = 0.85
_PRIOR_WEIGHT = 2.0
_DECAY = 0.99
"""Weight of the past at each observation: about the last hundred cycles count."""
_MARGIN = 1.03
"""A cycle must promise this much more than AR: the estimates are noisy, and AR is the promise."""
_PROBE_EVERY = 256
"""Where AR wins, every so many decisions draft all the same, to notice when the text becomes predictable."""


class _Acceptance:
    """Decayed counts of how often the draft at each depth agreed, given that all before it did."""

    def __init__(self, depths: int) -> None:
        self._tried = [_PRIOR_WEIGHT] * depths
        self._agreed = [_PRIOR_WEIGHT * _PRIOR_ACCEPTANCE] * depths

    def observe(self, drafted: int, accepted: int) -> None:
        for depth in range(min(drafted, accepted + 1)):
            self._tried[depth] = self._tried[depth] * _DECAY + 1
            self._agreed[depth] = self._agreed[depth] * _DECAY + (depth < accepted)

    def expected_tokens(self) -> list[float]:
        """Tokens per cycle of a block of 1, 2, ... rows."""
        expected, reach = [1.0], 1.0
        for tried, agreed in zip(self._tried, self._agreed, strict=True):
            reach *= agreed / tried
            expected.append(expected[-1] + reach)
        return expected


class DraftPlanner:
    """Picks the rows of each block. `cost` None fixes them at `max_rows`, as far as `pass_rows` reach for all sequences."""

    def __init__(self, max_rows: int, cost: DecodeCost | None, pass_rows: int) -> None:
        self.max_rows = max_rows
        self._pass_rows = pass_rows
        self._cost = cost
        self._acceptance = {greedy: _Acceptance(max_rows - 1) for greedy in (True, False)}
        self._ar_steps = 0

    def observe(self, greedy: bool, drafted: int, accepted: int) -> None:
        """Note one verified draft."""
        self._acceptance[greedy].observe(drafted, accepted)

    def block_rows(self, greedy: bool, batch: int) -> int:
        """Rows of the next block of a sequence while `batch` sequences decode; 1 means an AR step."""
        most = max(1, min(self.max_rows, self._pass_rows // batch))
        if self._cost is None or most == 1:
            return most
        expected = self._acceptance[greedy].expected_tokens()
        cost = self._cost
        rates = [expected[k - 1] / cost.cycle(k, batch, greedy) for k in range(2, most + 1)]
        best = max(range(len(rates)), key=rates.__getitem__)
        if rates[best] >= _MARGIN / cost.ar(batch, greedy):
            return best + 2
        self._ar_steps += 1
        return best + 2 if self._ar_steps % (_PROBE_EVERY * batch) == 0 else 1
