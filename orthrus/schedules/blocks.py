"""The rows of Orthrus' turns, by kind: what the schedule plans, and what the cost model times."""

from orthrus.plan import RowGroup, View
from orthrus.schedules.ar import ar_rows

DRAFT = "draft"
"""A diffusion block alone."""
LEAD_DRAFT = "lead draft"
"""A diffusion block and its lead, the AR row of the newest token."""
VERIFY = "verify"
"""The newest token and its drafts as AR rows."""
TREE = "tree"
"""Cost models use this for verify turns with trees. The turns themselves have the kind "verify"."""


def draft_rows(
    newest_token: int, num_rows: int, start: int, block_table: list[int], mask_token_id: int, *, lead: bool
) -> tuple[RowGroup, ...]:
    """A block of `num_rows` diffusion rows from position `start` on. lead: whether a lead comes before it, as the first group."""
    block = [newest_token, *[mask_token_id] * (num_rows - 1)]
    if lead:
        return (
            *ar_rows([newest_token], start, block_table),
            RowGroup(View.DIFFUSION, block, start, block_table, 0, num_rows),
        )
    # The last row's pick would not fit into the verify turn, so that row needs no logits.
    return (RowGroup(View.DIFFUSION, block, start, block_table, 0, num_rows - 1),)
