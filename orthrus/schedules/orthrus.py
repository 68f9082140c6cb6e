"""Orthrus' two-pass cycle (arXiv 2605.12825, section 3): a diffusion pass drafts a block, an AR pass verifies it.

Draft: rows [x_n, MASK, ...] at positions n, n + 1, ... each predict the token after them; the last row's prediction could not
be verified in the same block and is not asked for. Verify: AR rows [x_n, drafts]; the picks that agree with the drafts
are committed, and the first that does not, or the one after the last draft, is the bonus token.

A draft pass may have a lead: the AR row of x_n beside the block. Its pick is x_n+1 itself and committed at once, so that a
cycle brings two tokens at least, for reading the AR view's attention weights once more. Verification then starts from x_n+1.
"""

import itertools

from kernels import NO_TOKEN
from orthrus.plan import RowGroup, View
from orthrus.requests.sequence import Draft, Sequence
from orthrus.schedules.ar import ARSchedule
from orthrus.schedules.planner import DraftPlanner


class OrthrusSchedule:
    """`planner` says how many rows a block is worth, and whether a lead; a block of one is an AR step."""

    def __init__(self, planner: DraftPlanner, mask_token_id: int) -> None:
        self.max_rows = planner.max_rows
        self._planner = planner
        self._mask = mask_token_id
        self._ar = ARSchedule()

    def groups(self, sequence: Sequence, batch: int) -> tuple[RowGroup, ...]:
        n, pages = sequence.newest, sequence.pages
        if sequence.draft is not None:
            rows = [sequence.newest_token, *sequence.draft.tokens]
            return (RowGroup(View.AR, rows, n, pages, 0, len(rows)),)
        step = self._ar.groups(sequence, batch)
        # With one token to go, two rows would draft it and verify it: the AR step is one pass.
        room = sequence.max_length - n
        if room <= 2:
            return step
        plan = self._planner.plan(sequence.params.greedy, batch, begins=sequence.cycles == 0)
        # Tokens of a cycle: as many as the block has rows, and the lead's.
        rows_planned = min(plan.rows, room - plan.lead)
        if rows_planned < 2:
            return step
        block = [sequence.newest_token] + [self._mask] * (rows_planned - 1)
        # A grammar says what may follow x_n, not yet what may follow the token after it.
        if plan.lead and sequence.mask is None:
            return (*step, RowGroup(View.DIFFUSION, block, n, pages, 0, rows_planned))
        return (RowGroup(View.DIFFUSION, block, n, pages, 0, rows_planned - 1),)

    def commit(self, sequence: Sequence, groups: tuple[RowGroup, ...], picks: list[list[int]]) -> list[int]:
        if groups[-1].view is View.DIFFUSION:
            sequence.draft = _draft([_tokens(part) for part in picks])
            return picks[0] if sequence.draft.lead else []
        if len(groups[0].tokens) == 1:
            if sequence.draft == Draft([]):
                sequence.draft = None
            return picks[0]
        draft, sequence.draft = sequence.draft, None
        assert draft is not None, "what a block verifies has been drafted"
        agreeing = (i for i, (d, p) in enumerate(zip(draft.tokens, picks[0], strict=False)) if d != p)
        accepted = next(agreeing, len(draft.tokens))
        self._planner.observe(sequence.params.greedy, draft, accepted)
        return picks[0][: accepted + 1]

    def foresees(self, groups: tuple[RowGroup, ...]) -> bool:
        # Where the next block begins is known only when this one is verified.
        return groups[-1].view is View.DIFFUSION or len(groups[0].tokens) == 1

    def foresee(self, sequence: Sequence, groups: tuple[RowGroup, ...], feeds: list[list[int]]) -> None:
        if groups[-1].view is View.DIFFUSION:
            sequence.draft = _draft(feeds)
        if groups[0].view is View.AR:
            sequence.foreseen += feeds[0]


def _tokens(picks: list[int]) -> list[int]:
    """The picks up to the first that is none: nothing can be drafted behind it."""
    return list(itertools.takewhile(lambda token: token != NO_TOKEN, picks))


def _draft(picks: list[list[int]]) -> Draft:
    """What a draft pass drafted: behind a lead, the block's first pick is no news."""
    if len(picks) == 1:
        return Draft(picks[0])
    lead, block = picks
    return Draft(block[1:], lead=True, led=block[:1] == lead)
