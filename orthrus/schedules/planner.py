"""How many rows a draft block is worth, and whether a lead: expected tokens per second under measured costs and acceptance.

A cycle of K rows costs two passes of batch * K rows and commits 1 + sum over d < K of P(the first d drafts are accepted) tokens a
sequence; with a lead, whose pass costs more, the first of these is certain and one comes on top. An AR step costs one pass of
batch rows and commits one. The planner takes what has the best rate, an AR step included, which is what keeps Orthrus
from being slower than AR where rows are dear. Its choice never changes the text.

Acceptance is counted twice: over the last cycles, which say what the text is like now and how long a block should be, and over
many, which say what drafts are worth at all. Blocks have to pay by both, lest a batch drafts on the strength of what few
easy sequences left behind. Where drafts don't pay, some are tried now and then, the more seldom the more that costs, and
hardly ever where they are known to lose; where not even hopeful acceptance would pay, none are.

A look is at least one block, and goes on as long as it has gained more time than it has lost. So a text that drafts well is
drafted for at once, however badly the texts before it went, and one that doesn't costs no more than the look's last block. Where
another text begins, a look comes sooner: what is known is about those before it.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from orthrus.requests.sequence import Draft
from orthrus.schedules.pass_cost import DecodeCost

_PRIOR_ACCEPTANCE = 0.85
"""At each depth, before anything is known."""
_PRIOR_WEIGHT = 2.0
_HOPED_ACCEPTANCE = 0.95
"""At each depth, at best. Where it would not pay, nothing is drafted: better text is too rare to look for."""
_RECENT, _LASTING = 0.95, 0.998
"""Weight of the past at each observation: about the last twenty cycles count, and the last five hundred."""
_MARGIN = 1.06
"""A block must promise this much more than AR: the best of many noisy estimates promises too much, and AR is the promise."""
_OTHER_EVERY = 256
"""Every so many blocks, one is with a lead instead of without, or the other way round: the text may have become another."""
_PROBE_SHARE = 0.01
"""What looking again may cost where drafts don't pay at present, as a share of the AR steps."""
_PROBE_EVERY = 16
"""AR steps from one look to the next at least, however little it costs."""
_KNOWN_BLOCKS, _SELDOM = 100, 4096
"""After so many verified blocks it is known whether drafts lose on the whole; then, AR steps from one look to the next. A look
costs more than its own two passes: the sequences of a batch come out of it with different lengths."""
_MOST_GAINED = 8.0
"""AR steps of gain that a look may use up again before it ends: a text may become worse."""


_Choice = tuple[float, int, bool]
"""Speed over AR; the block's rows, and whether it has a lead."""


def _expected_tokens(acceptance: Iterable[float]) -> list[float]:
    """Tokens that a verification of 1, 2, ... rows commits. acceptance: of the draft at each depth, given all before it."""
    expected, reach = [1.0], 1.0
    for accepted in acceptance:
        reach *= accepted
        expected.append(expected[-1] + reach)
    return expected


class _Acceptance:
    """Decayed counts of how often the draft at each depth agreed, given that all before it did."""

    def __init__(self, depths: int, decay: float) -> None:
        self._decay = decay
        self._tried = [_PRIOR_WEIGHT] * depths
        self._agreed = [_PRIOR_WEIGHT * _PRIOR_ACCEPTANCE] * depths

    def observe(self, drafted: int, accepted: int) -> None:
        for depth in range(min(drafted, accepted + 1)):
            self._tried[depth] = self._tried[depth] * self._decay + 1
            self._agreed[depth] = self._agreed[depth] * self._decay + (depth < accepted)

    @property
    def blocks(self) -> float:
        """How many have been observed, as far as they still count."""
        return self._tried[0] - _PRIOR_WEIGHT

    def expected_tokens(self) -> list[float]:
        return _expected_tokens(
            agreed / tried for tried, agreed in zip(self._tried, self._agreed, strict=True)
        )


@dataclass
class _Probe:
    """Looks whether drafts have come to pay. asked: plans made since the last look; left: drafts still to make for this one.

    gained: what its blocks have brought so far beyond what they cost, in AR steps of a sequence.
    """

    asked: int = 0
    left: int = 0
    gained: float = 0.0

    def due(self, batch: int, after: int) -> bool:
        """Whether to draft this time, in a batch of `batch` sequences: all that ask in a row do, as a rule in one pass.

        One alone would make the pass dearer by nearly as much, and say less. after: AR steps from one look to the next.
        """
        if not self.left:
            self.asked += 1
            if self.gained <= 0 and self.asked <= after * batch:
                return False
            self.gained = max(0.0, self.gained)
            self.asked, self.left = 0, batch
        self.left -= 1
        return True

    def gain(self, steps: float, batch: int) -> None:
        """A block has brought so many tokens more than AR steps would have in its time."""
        self.gained = min(self.gained + steps, _MOST_GAINED * batch)


@dataclass(frozen=True)
class BlockPlan:
    """Rows of the next block, 1 for an AR step, and whether it has a lead."""

    rows: int
    lead: bool = False


_AR_STEP = BlockPlan(1)


@dataclass(frozen=True)
class _Ranking:
    """The best block with a lead and the best without, the better one first; none where none fits a pass or could ever pay.

    pays: it beats an AR step. look: what is tried where it doesn't. look_after: AR steps until then, on another text and on the
    same.
    """

    blocks: list[BlockPlan]
    pays: bool
    look: BlockPlan = _AR_STEP
    look_after: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class _BatchCost:
    """Seconds of a batch's AR step, and of its cycles with blocks of 2, 3, ... rows, by whether they have a lead."""

    step: float
    cycles: dict[bool, list[float]]

    def steps(self, block: BlockPlan) -> float:
        """AR steps that a cycle with `block` takes as long as."""
        return self.cycles[block.lead][block.rows - 2] / self.step

    def look(self, verified: dict[bool, list[float]]) -> BlockPlan:
        """The best of the blocks that would pay if all of their drafts agreed: others could not show that drafts pay."""
        blocks = (
            BlockPlan(rows + 2, lead) for lead, cycles in self.cycles.items() for rows in range(len(cycles))
        )
        return max(
            (block for block in blocks if block.rows + block.lead >= _MARGIN * self.steps(block)),
            key=lambda block: (verified[block.lead][block.rows - 1] + block.lead) / self.steps(block),
        )

    def best(self, lead: bool, verified: list[float]) -> _Choice:
        """The best of the blocks with or without a lead. verified: tokens that a verification of 1, 2, ... rows commits."""
        rates = zip(verified[1:], self.cycles[lead], strict=False)  # Blocks go as far as fit a pass.
        return max(
            ((lead + tokens) * self.step / cycle, rows, lead) for rows, (tokens, cycle) in enumerate(rates, 2)
        )


class DraftPlanner:
    """Plans each block. `cost` None fixes them at `max_rows`, as far as `pass_rows` reach for all sequences and their leads.

    lead: whether blocks have one; None for where that pays, and where nothing says so, not.
    """

    def __init__(
        self, max_rows: int, cost: DecodeCost | None, pass_rows: int, lead: bool | None = None
    ) -> None:
        self.max_rows = max_rows
        self._pass_rows = pass_rows
        self._cost = cost
        self._leads = (lead,) if lead is not None else (False, True) if cost is not None else (False,)
        self._acceptance = {
            (greedy, lead, decay): _Acceptance(max_rows - 1, decay)
            for greedy in (True, False)
            for lead in (True, False)
            for decay in (_RECENT, _LASTING)
        }
        self._blocks = 0
        # Of (greedy, batch): sequences of a pass ask for the same, and where none drafts, nothing changes.
        self._rankings: dict[tuple[bool, int], _Ranking] = {}
        # What no text changes is found out once.
        self._batch_costs: dict[tuple[bool, int], _BatchCost | None] = {}
        self._probes: dict[tuple[bool, int], _Probe] = defaultdict(_Probe)
        # The batch that has looked last, greedy and sampled.
        self._looking: dict[bool, int] = {}

    def observe(self, greedy: bool, draft: Draft, accepted: int) -> None:
        """Note that of one verified draft the first `accepted` tokens agreed."""
        self._rankings.clear()
        drafted = len(draft.tokens)
        self._count_look(greedy, BlockPlan(drafted + 1, draft.lead), accepted)
        self._observe(greedy, draft.lead, drafted, accepted)
        if draft.lead:
            # Without its lead, the block would have been tried like this; its last draft not at all.
            self._observe(greedy, False, drafted, accepted + 1 if draft.led else 0)
        elif accepted:
            self._observe(greedy, True, drafted - 1, accepted - 1)

    def _observe(self, greedy: bool, lead: bool, drafted: int, accepted: int) -> None:
        for decay in (_RECENT, _LASTING):
            self._acceptance[greedy, lead, decay].observe(drafted, accepted)

    def _count_look(self, greedy: bool, block: BlockPlan, accepted: int) -> None:
        """Note what a block brought if it was a look."""
        if (batch := self._looking.get(greedy)) is None:
            return
        costs = self._batch_costs[greedy, batch]
        # Another batch may have drafted it, a longer one than this batch could.
        if costs is not None and block.rows - 2 < len(costs.cycles.get(block.lead, ())):
            self._probes[greedy, batch].gain(accepted + 1 + block.lead - costs.steps(block), batch)

    def plan(self, greedy: bool, batch: int, begins: bool = False) -> BlockPlan:
        """The next block of a sequence while `batch` sequences decode. begins: it is the sequence's first."""
        ranking = self._rankings.get((greedy, batch))
        if ranking is None:
            ranking = self._rankings[greedy, batch] = self._rank(greedy, batch)
        if not ranking.blocks:
            return _AR_STEP
        if not ranking.pays:
            # Where several decode, one of them says too little.
            after = ranking.look_after[0 if begins and batch == 1 else 1]
            if not self._probes[greedy, batch].due(batch, after):
                return _AR_STEP
            self._looking[greedy] = batch
            return ranking.look
        self._probes.pop((greedy, batch), None)
        self._looking.pop(greedy, None)
        self._blocks += 1
        return ranking.blocks[-1 if self._blocks % (_OTHER_EVERY * batch) == 0 else 0]

    def _most_rows(self, batch: int) -> dict[bool, int]:
        """The longest blocks that fit a pass, with a lead and without."""
        most = {lead: min(self.max_rows, self._pass_rows // batch - lead) for lead in self._leads}
        return {lead: rows for lead, rows in most.items() if rows > 1}

    def _batch_cost(self, cost: DecodeCost, greedy: bool, batch: int) -> _BatchCost | None:
        """What the batch's blocks cost; None where none fits a pass or would pay even on hopeful text."""
        cycles = {
            lead: [cost.cycle(rows, batch, greedy, lead) for rows in range(2, most + 1)]
            for lead, most in self._most_rows(batch).items()
        }
        costs = _BatchCost(cost.ar(batch, greedy), cycles)
        hoped = _expected_tokens([_HOPED_ACCEPTANCE] * (self.max_rows - 1))
        return costs if any(costs.best(lead, hoped)[0] >= _MARGIN for lead in cycles) else None

    def _rank(self, greedy: bool, batch: int) -> _Ranking:
        if self._cost is None:
            blocks = [BlockPlan(rows, lead) for lead, rows in self._most_rows(batch).items()]
            return _Ranking(blocks[:1], pays=True)
        if (greedy, batch) not in self._batch_costs:
            self._batch_costs[greedy, batch] = self._batch_cost(self._cost, greedy, batch)
        costs = self._batch_costs[greedy, batch]
        if costs is None:
            return _Ranking([], pays=False)
        expected = {
            (lead, decay): self._acceptance[greedy, lead, decay].expected_tokens()
            for lead in costs.cycles
            for decay in (_RECENT, _LASTING)
        }
        recent, lasting = (
            sorted((costs.best(lead, expected[lead, decay]) for lead in costs.cycles), reverse=True)
            for decay in (_RECENT, _LASTING)
        )
        on_the_whole, _, lasting_lead = lasting[0]
        look = costs.look({lead: expected[lead, _RECENT] for lead in costs.cycles})
        steps_lost = costs.steps(look) - look.lead - expected[look.lead, _RECENT][look.rows - 1]
        look_after = max(_PROBE_EVERY, round(steps_lost / _PROBE_SHARE))
        known = self._acceptance[greedy, lasting_lead, _LASTING].blocks >= _KNOWN_BLOCKS
        return _Ranking(
            [BlockPlan(rows, lead) for _, rows, lead in recent],
            pays=min(recent[0][0], on_the_whole) >= _MARGIN,
            look=look,
            look_after=(look_after, _SELDOM if known and on_the_whole < _MARGIN else look_after),
        )
