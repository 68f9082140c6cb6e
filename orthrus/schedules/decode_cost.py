"""What decoding costs with Orthrus' turns and with AR steps: sums of measured passes."""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from orthrus.plan import RowGroup, View
from orthrus.schedules.ar import STEP, ar_rows
from orthrus.schedules.blocks import DRAFT, LEAD_DRAFT, TREE, VERIFY, draft_rows
from orthrus.schedules.draft_tree import MAX_RUNS
from orthrus.schedules.pass_cost import PassCost, PassShape, PassTimer
from orthrus.schedules.pass_factors import PassFactors
from orthrus.schedules.protocol import PassTime


class CycleCost(Protocol):
    """The costs of passes, as planners read them."""

    @property
    def version(self) -> int:
        """Grows whenever costs change."""
        ...

    @property
    def lead(self) -> PassCost | None:
        """A draft pass with leads; None if no pass may have leads."""
        ...

    def ar(self, batch: int, greedy: bool) -> float:
        """Seconds of an AR step of `batch` sequences: one token each."""
        ...

    def cycle(
        self, block_rows: float, batch: int, greedy: bool, lead: bool = False, tree_rows: int = 0
    ) -> float:
        """Seconds of a cycle of `batch` sequences with `block_rows` rows each, on average.

        tree_rows: rows of each sequence's tree in the verify pass; 0 for a chain, which has as many rows as the block.
        """
        ...


def verify_shape(*, ahead: bool) -> PassShape:
    """Passes that verify drafts as AR rows. ahead: whether the next pass is launched before their picks are known."""
    return PassShape(
        VERIFY, lambda rows, start, block_table: ar_rows([0] * rows, start, block_table), ahead=ahead
    )


def tree_shape(page_size: int) -> PassShape:
    """Passes that verify trees: half of the rows are a chain, and the others branch off from it in pairs."""

    def groups(rows: int, start: int, block_table: list[int]) -> list[RowGroup]:
        [chain] = ar_rows([0] * -(-rows // 2), start, block_table)
        found, left = [chain], rows // 2
        while left:
            count = min(left, max(2, -(-left // (MAX_RUNS - len(found)))))
            first = min(start + len(found), chain.end)
            # From the page in which the branch begins: page 0, which keeps nothing.
            page = first // page_size
            table = [*block_table[:page], *[0] * (len(block_table) - page)]
            found.append(RowGroup(View.AR, [0] * count, first, table, 0, count, chain))
            left -= count
        return found

    return PassShape(TREE, groups, ahead=True)


def step_shape(verify: PassShape) -> PassShape:
    """AR steps: verify passes of one row for each sequence."""
    return PassShape(STEP, verify.groups, one_row=True, ahead=True)


@dataclass(frozen=True)
class DecodeCost:
    """Seconds of an AR step and of a draft and verify cycle."""

    step: PassCost
    """An AR pass, by the number of sequences."""
    draft: PassCost
    """A draft pass without leads, by rows and sequences."""
    verify: PassCost
    """A verify pass, by rows and sequences."""
    lead: PassCost | None = None
    """A draft pass with leads, by the rows of the blocks alone and by sequences. None: no pass may have leads."""
    tree: PassCost | None = None
    """A verify pass of trees, by rows and sequences. None: there are no trees."""
    sampled_row: float = 0.0
    """Seconds that a row adds to a pass if its pick is sampled rather than greedy."""

    @cached_property
    def factors(self) -> PassFactors:
        """Corrections of the measured costs, from the passes that have run since."""
        kinds = {
            STEP: self.step,
            DRAFT: self.draft,
            VERIFY: self.verify,
            LEAD_DRAFT: self.lead,
            TREE: self.tree,
        }
        return PassFactors({kind: cost for kind, cost in kinds.items() if cost is not None})

    @property
    def version(self) -> int:
        return self.factors.version

    def observe(self, time: PassTime) -> None:
        """Correct the costs by the time that a pass took."""
        kind, rows, sequences = time.kind, time.rows, time.sequences
        if kind == STEP:
            rows, sequences = sequences, 1
        elif kind == DRAFT:
            rows += sequences  # Costs count whole blocks. One without a lead does not run its last row.
        elif kind == LEAD_DRAFT:
            rows -= sequences
        elif kind == VERIFY and time.groups > sequences:
            kind = TREE
        self.factors.observe(kind, rows, sequences, time.seconds)

    @staticmethod
    def measured(timer: PassTimer, mask_token_id: int, *, leads: bool, trees: bool) -> "DecodeCost":
        """Time the passes on this machine. leads: whether passes may have leads. trees: whether there are trees."""
        verify = verify_shape(ahead=True)
        draft, lead = (
            PassShape(
                kind,
                lambda rows, start, block_table, lead=lead: draft_rows(  # type: ignore[misc]
                    0, rows, start, block_table, mask_token_id, lead=lead
                ),
                ahead=True,
            )
            for kind, lead in ((DRAFT, False), (LEAD_DRAFT, True))
        )
        step = step_shape(verify)
        shapes = [
            step,
            draft,
            verify,
            *([lead] if leads else []),
            *([tree_shape(timer.page_size)] if trees else []),
        ]
        curves = timer.curves(shapes)
        return DecodeCost(
            step=curves[STEP],
            draft=curves[DRAFT],
            verify=curves[VERIFY],
            lead=curves.get(LEAD_DRAFT),
            tree=curves.get(TREE),
            sampled_row=timer.sampled_row(verify),
        )

    def ar(self, batch: int, greedy: bool) -> float:
        """Seconds of an AR step of `batch` sequences: one token each."""
        return self.factors[STEP] * self.step(batch) + (0.0 if greedy else batch * self.sampled_row)

    def cycle(
        self, block_rows: float, batch: int, greedy: bool, lead: bool = False, tree_rows: int = 0
    ) -> float:
        """Seconds of a draft pass and a verify pass of `batch` sequences: see `CycleCost`."""
        rows, verified = block_rows * batch, (tree_rows or block_rows) * batch
        draft, verify = self.lead if lead else self.draft, self.tree if tree_rows else self.verify
        assert draft is not None and verify is not None, "the planner considers what passes may have"
        seconds = self.factors[LEAD_DRAFT if lead else DRAFT] * draft(rows, batch)
        seconds += self.factors[TREE if tree_rows else VERIFY] * verify(verified, batch)
        # A draft pass picks one token less than a block has rows; with a lead, one more.
        num_picks = rows + verified + (batch if lead else -batch)
        return seconds + (0.0 if greedy else num_picks * self.sampled_row)
