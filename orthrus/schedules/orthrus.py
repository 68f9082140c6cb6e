"""Orthrus' two-pass cycle (arXiv 2605.12825, section 3): a diffusion pass drafts a block, an AR pass verifies it.

Draft: rows [x_n, MASK, ...] at positions n, n + 1, ... each predict the token after them; the last row's prediction could not
be verified in the same block and is not asked for. Verify: AR rows [x_n, drafts]; the picks that agree with the drafts
are committed, and the first that does not, or the one after the last draft, is the bonus token.
"""

from orthrus.draft_planner import DraftPlanner
from orthrus.plan import RowGroup, View
from orthrus.schedules.ar import ARSchedule
from orthrus.sequence import Sequence


class OrthrusSchedule:
    """`planner` says how many rows a block is worth; a block of one is an AR step."""

    def __init__(self, planner: DraftPlanner, mask_token_id: int) -> None:
        self.max_rows = planner.max_rows
        self._planner = planner
        self._mask = mask_token_id
        self._ar = ARSchedule()

    def group(self, sequence: Sequence, batch: int) -> RowGroup:
        n = sequence.newest
        if sequence.draft is not None:
            rows = [sequence.newest_token, *sequence.draft]
            return RowGroup(View.AR, rows, n, sequence.pages, 0, len(rows))
        # With one token to go, two rows would draft it and verify it: the AR step is one pass.
        room = sequence.max_length - n
        rows_planned = min(self._planner.block_rows(sequence.params.greedy, batch), room) if room > 2 else 1
        if rows_planned < 2:
            return self._ar.group(sequence, batch)
        block = [sequence.newest_token] + [self._mask] * (rows_planned - 1)
        return RowGroup(View.DIFFUSION, block, n, sequence.pages, 0, rows_planned - 1)

    def commit(self, sequence: Sequence, group: RowGroup, picks: list[int]) -> list[int]:
        if group.view is View.DIFFUSION:
            sequence.draft = picks
            return []
        if len(group.tokens) == 1:
            return self._ar.commit(sequence, group, picks)
        draft, sequence.draft = sequence.draft, None
        assert draft is not None, "what a block verifies has been drafted"
        accepted = next((i for i, (d, p) in enumerate(zip(draft, picks, strict=False)) if d != p), len(draft))
        self._planner.observe(sequence.params.greedy, len(draft), accepted)
        return picks[: accepted + 1]

    def foresees(self, group: RowGroup) -> bool:
        # Where the next block begins is known only when this one is verified.
        return group.view is View.DIFFUSION or len(group.tokens) == 1

    def foresee(self, sequence: Sequence, group: RowGroup, feeds: list[int]) -> None:
        if group.view is View.DIFFUSION:
            sequence.draft = feeds
        else:
            self._ar.foresee(sequence, group, feeds)
