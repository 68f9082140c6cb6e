"""Chooses the length of each draft block, and whether it has a lead, so that tokens per second are expected to be highest.

A cycle with blocks of K rows runs two passes of batch * K rows. Per sequence it commits

    1 + sum over d = 1 ... K - 1 of P(the first d drafts are accepted)

tokens, and one more with a lead. An AR step runs one pass of batch rows and commits one token per sequence. The planner takes
whichever has the best rate. AR steps compete too: where rows are expensive, they win. The choice never changes the text.
Where blocks pay, a tree of drafts may be verified in place of a chain (`TreePlanner`).

How often drafts are accepted is counted twice, with a short and with a long memory. The short one (about twenty cycles) says
what the current text is like and how long a block should be. The long one (about five hundred cycles) says what drafts are
worth in general. Blocks must pay by both counts: else a large batch would draft because of a few easy sequences before it.

Where drafts do not pay at present, the planner *probes*: now and then it drafts all the same, to find out whether drafts pay by
now. The more a probe costs, the rarer probes are. Once drafts are known to lose, there are hardly any. There are none where not
even drafts that are right 95 % of the time would pay.

A probe is one block for each sequence of the batch. It is repeated while probes have gained more time than they lost. So a text
that drafts well is drafted for at once, whatever came before it. A text that does not costs only the last block of the probe. A
new text is probed sooner, because the counts are about the texts before it.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from orthrus.schedules.decode_cost import CycleCost
from orthrus.schedules.draft_tree import DraftTree

_PRIOR_ACCEPTANCE = 0.85
"""Assumed acceptance at each depth before any draft has been verified."""
_PRIOR_WEIGHT = 2.0
"""How many observations the assumed acceptance counts as."""
_HOPED_ACCEPTANCE = 0.95
"""Acceptance of very good drafts, at each depth. Where not even these would pay, nothing is drafted."""
_RECENT, _LASTING = 0.95, 0.998
"""The short and the long memory: what an earlier count is multiplied by at each observation."""
_MARGIN = 1.06
"""A block must promise this many times the speed of AR steps. The best of many noisy estimates is usually too high."""
_OTHER_EVERY = 256
"""One block in so many takes the choice that seems worse, a lead or none, in case the text has changed."""
_PROBE_SHARE = 0.01
"""Most time that probes may lose, as a share of the AR steps."""
_PROBE_EVERY = 16
"""Fewest AR steps between two probes, however little a probe costs."""
_KNOWN_BLOCKS, _SELDOM = 100, 4096
"""After `_KNOWN_BLOCKS` verified blocks it is known whether drafts lose in general. If they do, there are `_SELDOM` AR steps
between two probes. A probe costs more than its two passes: it leaves the sequences of a batch with different lengths."""
_MOST_GAINED = 8.0
"""Cap on saved-up gain: at most this many AR steps per sequence may be lost before probing stops."""


# Not frozen: `OrthrusSchedule` fills it in bit by bit. Making frozen ones would also take four times as long.
@dataclass(slots=True)
class Draft:
    """Drafted tokens that wait to be verified."""

    tokens: list[int]
    """Drafts for the positions after the newest committed token, in order."""
    lead: bool = False
    """Whether the block had a lead, whose token has been committed before these."""
    first_agreed: bool = False
    """With a lead: whether the block's own first pick was the lead's token too."""
    further: Sequence[Sequence[int]] = ()
    """For each rank from 1 on: the tokens that were picked for these positions. `tokens` have rank 0, the likeliest."""
    tree: DraftTree | None = None
    """The tree of these tokens that a pass verifies. None before that, and if it verifies `tokens` alone."""
    tree_rows: int = 0
    """Rows of the tree that the pass is to verify; 0 for these tokens alone."""
    following: "BlockPlan | None" = None
    """The next block, if it is chosen before these tokens are verified."""

    @property
    def candidates(self) -> list[list[int]]:
        """For each position, the tokens of all ranks."""
        return [list(ranks) for ranks in zip(self.tokens, *self.further, strict=False)]


_Candidate = tuple[float, int, bool]
"""Speed of a block over AR steps, its rows, and whether it has a lead."""


def _expected_tokens(acceptance: Iterable[float]) -> list[float]:
    """Expected tokens from verify turns of 1, 2, ... rows.

    acceptance: at each depth, the chance that the draft is right if all drafts before it are.
    """
    expected, reach = [1.0], 1.0
    for accepted in acceptance:
        reach *= accepted
        expected.append(expected[-1] + reach)
    return expected


class _Acceptance:
    """How often the draft at each depth was right if all drafts before it were, with older observations counting less."""

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
        """Number of observed blocks, older ones counting less."""
        return self._tried[0] - _PRIOR_WEIGHT

    def expected_tokens(self) -> list[float]:
        return _expected_tokens(
            agreed / tried for tried, agreed in zip(self._tried, self._agreed, strict=True)
        )


@dataclass
class _Probe:
    """Decides when to try drafts where they do not pay at present."""

    asked: int = 0
    """Plans made since the last probe."""
    left: int = 0
    """Blocks that this probe is still to draft."""
    gained: float = 0.0
    """What the blocks of probes have gained so far, in AR steps of one sequence; negative if they have lost time."""

    def due(self, batch: int, after: int) -> bool:
        """Whether to draft now. after: AR steps from one probe to the next.

        All `batch` sequences draft, normally in the same pass. One block alone would cost the pass nearly as much and say less.
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
        """Note that a block committed `steps` more tokens than AR steps would have in its time."""
        self.gained = min(self.gained + steps, _MOST_GAINED * batch)


@dataclass(frozen=True)
class BlockPlan:
    """What to draft next."""

    rows: int
    """Rows of the block, the newest token's included; 1 for an AR step."""
    lead: bool = False
    tree_rows: int = 0
    """Rows of the tree that is verified; 0 for the block's drafts as a chain."""
    candidates: bool = False
    """Whether each position gets several candidates: for a tree, or to learn how often they are right."""


_AR_STEP = BlockPlan(1)


@dataclass(frozen=True)
class _Ranking:
    """What to do with one kind of text at one batch size."""

    blocks: list[BlockPlan]
    """The best block with a lead and the best without, the better one first. Empty if no block could ever pay."""
    pays: bool
    """Whether the first of these beats an AR step."""
    speed: float = 1.0
    """Speed of that block over AR steps."""
    probe: BlockPlan = _AR_STEP
    """The block of a probe, if it does not."""
    probe_after: tuple[int, int] = (0, 0)
    """AR steps from one probe to the next: where a new text begins, and within a text."""


@dataclass(frozen=True)
class _BatchCost:
    """What passes of one batch size cost."""

    step: float
    """Seconds of an AR step."""
    cycles: dict[bool, list[float]]
    """Seconds of cycles with blocks of 2, 3, ... rows, with a lead (True) and without."""

    def steps(self, block: BlockPlan) -> float:
        """How many AR steps fit into the time of a cycle with `block`."""
        return self.cycles[block.lead][block.rows - 2] / self.step

    def probe(self, verified: dict[bool, list[float]]) -> BlockPlan:
        """The best of the blocks that would pay if all their drafts were right: others cannot show that drafts pay."""
        blocks = (
            BlockPlan(rows + 2, lead) for lead, cycles in self.cycles.items() for rows in range(len(cycles))
        )
        return max(
            (block for block in blocks if block.rows + block.lead >= _MARGIN * self.steps(block)),
            key=lambda block: (verified[block.lead][block.rows - 1] + block.lead) / self.steps(block),
        )

    def best(self, lead: bool, verified: list[float]) -> _Candidate:
        """The best of the blocks with or without a lead. verified: expected tokens from verify turns of 1, 2, ... rows."""
        # `cycles` ends where blocks no longer fit a pass.
        rates = zip(verified[1:], self.cycles[lead], strict=False)
        return max(
            ((lead + tokens) * self.step / cycle, rows, lead) for rows, (tokens, cycle) in enumerate(rates, 2)
        )


class DraftPlanner:
    """Plans each block, from what passes cost and from how often drafts have been accepted."""

    def __init__(
        self, max_rows: int, cost: CycleCost | None, pass_rows: int, lead: bool | None = None
    ) -> None:
        """max_rows: most rows of a block. cost: None fixes blocks at `max_rows`, or at what fits a pass.

        pass_rows: most rows of all sequences in a pass. lead: whether blocks have a lead. None lets the costs decide, and means
        no lead if `cost` has none for leads.
        """
        self.max_rows = max_rows
        self._pass_rows = pass_rows
        self._cost = cost
        has_choice = lead is None and cost is not None and cost.lead is not None
        self._leads = (False, True) if has_choice else (bool(lead),)
        self._acceptance = {
            (greedy, lead, decay): _Acceptance(max_rows - 1, decay)
            for greedy in (True, False)
            for lead in (True, False)
            for decay in (_RECENT, _LASTING)
        }
        self._blocks = 0
        # By (greedy, batch). Kept until the next observation, because all sequences of a pass ask for the same.
        self._rankings: dict[tuple[bool, int], _Ranking] = {}
        # By (greedy, batch). Kept until costs change, because they do not depend on the text.
        self._batch_costs: dict[tuple[bool, int], _BatchCost | None] = {}
        self._cost_version = 0
        self._probes: dict[tuple[bool, int], _Probe] = defaultdict(_Probe)
        # The batch size of the last probe, for greedy and for sampled text.
        self._probing: dict[bool, int] = {}

    def observe(self, greedy: bool, draft: Draft, accepted: int) -> None:
        """Note that the first `accepted` tokens of a verified draft were right."""
        self._rankings.clear()
        drafted = len(draft.tokens)
        self._count_probe(greedy, BlockPlan(drafted + 1, draft.lead), accepted)
        self._observe(greedy, draft.lead, drafted, accepted)
        if draft.lead:
            # Without a lead, the block's first pick would have been a draft too, and its last pick would not.
            self._observe(greedy, False, drafted, accepted + 1 if draft.first_agreed else 0)
        elif accepted:
            self._observe(greedy, True, drafted - 1, accepted - 1)

    def _observe(self, greedy: bool, lead: bool, drafted: int, accepted: int) -> None:
        for decay in (_RECENT, _LASTING):
            self._acceptance[greedy, lead, decay].observe(drafted, accepted)

    def _count_probe(self, greedy: bool, block: BlockPlan, accepted: int) -> None:
        """Note what a block gained if it was a probe."""
        if (batch := self._probing.get(greedy)) is None:
            return
        costs = self._batch_costs.get((greedy, batch))
        # A block that was drafted at another batch size may be too long for this one, and then has no cost.
        if costs is not None and block.rows - 2 < len(costs.cycles.get(block.lead, ())):
            self._probes[greedy, batch].gain(accepted + 1 + block.lead - costs.steps(block), batch)

    def speed(self, greedy: bool, batch: int) -> float:
        """Expected tokens per second of the next block, over those of AR steps; 1 if drafts don't pay at present."""
        ranking = self._ranking(greedy, batch)
        return ranking.speed if ranking.pays else 1.0

    def pays(self, greedy: bool, batch: int) -> bool:
        """Whether drafts pay at present where `batch` sequences decode: then `plan` gives no AR steps."""
        return self._ranking(greedy, batch).pays

    def could_pay(self, greedy: bool, batch: int) -> bool:
        """Whether `plan` can give blocks where `batch` sequences decode: one fits a pass, and very good drafts would pay."""
        return bool(self._ranking(greedy, batch).blocks)

    def _ranking(self, greedy: bool, batch: int) -> _Ranking:
        if self._cost is not None and self._cost.version != self._cost_version:
            self._cost_version = self._cost.version
            self._batch_costs.clear()
            self._rankings.clear()
        ranking = self._rankings.get((greedy, batch))
        if ranking is None:
            ranking = self._rankings[greedy, batch] = self._rank(greedy, batch)
        return ranking

    def plan(self, greedy: bool, batch: int, begins: bool = False) -> BlockPlan:
        """The next block of a sequence while `batch` sequences decode. begins: whether it is the sequence's first block."""
        ranking = self._ranking(greedy, batch)
        if not ranking.blocks:
            return _AR_STEP
        if not ranking.pays:
            # In a batch, a new sequence is no reason to probe the whole batch early.
            after = ranking.probe_after[0 if begins and batch == 1 else 1]
            if not self._probes[greedy, batch].due(batch, after):
                return _AR_STEP
            self._probing[greedy] = batch
            return ranking.probe
        self._probes.pop((greedy, batch), None)
        self._probing.pop(greedy, None)
        self._blocks += 1
        return ranking.blocks[-1 if self._blocks % (_OTHER_EVERY * batch) == 0 else 0]

    def _most_rows(self, batch: int) -> dict[bool, int]:
        """The longest blocks that fit a pass, with a lead and without."""
        most = {lead: min(self.max_rows, self._pass_rows // batch - lead) for lead in self._leads}
        return {lead: rows for lead, rows in most.items() if rows > 1}

    def _batch_cost(self, cost: CycleCost, greedy: bool, batch: int) -> _BatchCost | None:
        """What passes cost at this batch size; None if no block fits a pass, or none would pay with very good drafts."""
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
            return _Ranking(blocks[:1], pays=bool(blocks))
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
        lasting_speed, _, lasting_lead = lasting[0]
        probe = costs.probe({lead: expected[lead, _RECENT] for lead in costs.cycles})
        steps_lost = costs.steps(probe) - probe.lead - expected[probe.lead, _RECENT][probe.rows - 1]
        probe_after = max(_PROBE_EVERY, round(steps_lost / _PROBE_SHARE))
        known = self._acceptance[greedy, lasting_lead, _LASTING].blocks >= _KNOWN_BLOCKS
        return _Ranking(
            [BlockPlan(rows, lead) for _, rows, lead in recent],
            pays=min(recent[0][0], lasting_speed) >= _MARGIN,
            speed=recent[0][0],
            probe=probe,
            probe_after=(probe_after, _SELDOM if known and lasting_speed < _MARGIN else probe_after),
        )
