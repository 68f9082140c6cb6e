"""What decoding costs with Orthrus' turns and with AR steps: sums of measured passes."""

from dataclasses import dataclass
from typing import Protocol

from orthrus.schedules.ar import STEP, ar_rows
from orthrus.schedules.blocks import DRAFT, LEAD_DRAFT, VERIFY, draft_rows
from orthrus.schedules.pass_cost import PassCost, PassShape, PassTimer


class CycleCost(Protocol):
    """What a planner asks of costs."""

    @property
    def lead(self) -> PassCost | None:
        """A draft pass with leads; None if no pass may have leads."""
        ...

    def ar(self, batch: int, greedy: bool) -> float:
        """Seconds of an AR step of `batch` sequences: one token each."""
        ...

    def cycle(self, block_rows: int, batch: int, greedy: bool, lead: bool = False) -> float:
        """Seconds of a cycle of `batch` sequences with `block_rows` rows each."""
        ...


def verify_shape(*, ahead: bool) -> PassShape:
    """Passes that verify drafts as AR rows. ahead: whether the next pass is launched before their picks are known."""
    return PassShape(
        VERIFY, lambda rows, start, block_table: ar_rows([0] * rows, start, block_table), ahead=ahead
    )


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
    sampled_row: float = 0.0
    """What a row adds to a pass if its pick is sampled rather than greedy."""

    @staticmethod
    def measured(timer: PassTimer, mask_token_id: int, *, leads: bool, trees: bool) -> "DecodeCost":
        """Time the passes on this machine. leads: whether passes may have leads. trees: whether drafts are verified as trees."""
        verify = verify_shape(ahead=not trees)  # The pass behind a tree has to wait for its picks.
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
        curves = timer.curves([step, draft, verify, lead] if leads else [step, draft, verify])
        return DecodeCost(
            step=curves[STEP],
            draft=curves[DRAFT],
            verify=curves[VERIFY],
            lead=curves.get(LEAD_DRAFT),
            sampled_row=timer.sampled_row(verify),
        )

    def ar(self, batch: int, greedy: bool) -> float:
        """Seconds of an AR step of `batch` sequences: one token each."""
        return self.step(batch) + (0.0 if greedy else batch * self.sampled_row)

    def cycle(self, block_rows: int, batch: int, greedy: bool, lead: bool = False) -> float:
        """Seconds of a draft pass and a verify pass of `batch` sequences with `block_rows` rows each."""
        rows = block_rows * batch
        draft = self.lead if lead else self.draft
        assert draft is not None, "the planner considers leads only where passes may have them"
        seconds = draft(rows, batch) + self.verify(rows, batch)
        # A draft pass picks one token less than a block has rows; with a lead, one more.
        num_picks = 2 * rows + (batch if lead else -batch)
        return seconds + (0.0 if greedy else num_picks * self.sampled_row)
