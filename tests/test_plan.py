"""The order of a pass's rows, where they go in the cache, and which of them need logits."""

import pytest
import torch

from orthrus.plan import PassPlan, RowGroup, View, flatten

PAGE = 8


def ar(
    tokens: list[int], start: int, block_table: list[int], logits: tuple[int, int] | None = None
) -> RowGroup:
    return RowGroup(View.AR, tokens, start, block_table, *(logits or (0, len(tokens))))


def diffusion(tokens: list[int], start: int, block_table: list[int]) -> RowGroup:
    return RowGroup(View.DIFFUSION, tokens, start, block_table, 0, len(tokens) - 1)


def test_ar_rows_come_first_and_groups_keep_their_order() -> None:
    groups = [
        diffusion([1, 2], 20, [9, 8, 7]),
        ar([3], 30, [1, 2, 3, 4]),
        ar([4, 5, 6], 6, [5, 6], logits=(2, 3)),
        ar([7], 0, [11]),
    ]
    rows = flatten(groups, PAGE)
    assert rows.tokens.tolist() == [3, 4, 5, 6, 7, 1, 2]
    assert rows.positions.tolist() == [30, 6, 7, 8, 0, 20, 21]
    assert rows.num_ar == 5
    assert [(g.first_row, g.num_rows, g.start, g.diffusion) for g in rows.groups] == [
        (0, 1, 30, False),
        (1, 3, 6, False),
        (4, 1, 0, False),
        (5, 2, 20, True),
    ]
    # In the order of the groups that were given, not of the rows.
    assert rows.logit_rows.tolist() == [5, 0, 3, 4]


def test_slots_follow_the_block_table_across_pages_and_diffusion_rows_write_none() -> None:
    rows = flatten([ar(list(range(20)), 6, [5, 2, 9, 4]), diffusion([1, 2, 3], 26, [5, 2, 9, 4])], PAGE)
    table = [5, 2, 9, 4]
    assert rows.slots[:20].tolist() == [table[p // PAGE] * PAGE + p % PAGE for p in range(6, 26)]
    assert rows.slots[20:].tolist() == [0, 0, 0]


def test_groups_of_one_sequence_may_have_block_tables_of_their_own() -> None:
    # Two continuations from position 9 on, which share the first page.
    first, second = flatten([ar([1, 2], 9, [3, 4]), ar([1, 5], 9, [3, 6])], PAGE).slots.reshape(2, 2).tolist()
    assert first == [4 * PAGE + 1, 4 * PAGE + 2]
    assert second == [6 * PAGE + 1, 6 * PAGE + 2]


@pytest.mark.parametrize("page_size", [1, 16])
def test_a_pass_of_diffusion_rows_alone_has_no_ar_rows(page_size: int) -> None:
    rows = flatten([diffusion([1, 2, 3, 4], 3, [1, 2, 3])], page_size)
    assert rows.num_ar == 0
    assert rows.slots.tolist() == [0, 0, 0, 0]
    assert rows.logit_rows.tolist() == [0, 1, 2]


def test_the_plan_has_the_same_numbers_on_the_device() -> None:
    groups = [diffusion([1, -3], 4, [2]), ar([5, 6, 7], 1, [2])]
    rows = flatten(groups, PAGE)
    plan = PassPlan.build(groups, page_size=PAGE, heads_per_kv=2, device=torch.device("cpu"))
    assert plan.writes.slots.tolist() == rows.slots.tolist()
    for name in ("tokens", "positions", "logit_rows"):
        assert getattr(plan, name).tolist() == getattr(rows, name).tolist(), name
    assert plan.num_ar.tolist() == [3]
    assert plan.attention.groups == rows.groups
    assert plan.attention.page_size == PAGE


def writes_from(*groups: RowGroup) -> list[int | None]:
    """In the order of the pass."""
    return [group.writes_from for group in flatten(groups, PAGE).groups]


def test_a_group_says_from_where_on_the_pass_writes_what_it_reads() -> None:
    table = [1, 2, 3, 4]
    # What an AR group reads, it writes itself from its start on; so does a long one, across pages.
    assert writes_from(ar([5], 19, table)) == [19]
    assert writes_from(ar(list(range(20)), 6, table)) == [6]
    # A diffusion block reads nothing that is written beside other sequences' rows.
    assert writes_from(diffusion([5, 1], 19, table), ar([6], 3, [9])) == [3, None]
    assert writes_from(diffusion([5, 1], 0, [])) == [None]


def test_a_block_behind_rows_of_the_same_pass_waits_for_them() -> None:
    table = [1, 2, 3, 4]
    # Drafted on top of rows that are verified in this very pass, in the same page or pages before it.
    assert writes_from(ar([5, 6, 7], 17, table), diffusion([7, 1], 20, table)) == [17, 17]
    assert writes_from(ar(list(range(12)), 6, table), diffusion([7, 1], 18, table)) == [6, 6]
    # An AR row beside the block writes behind what the block sees.
    assert writes_from(ar([5], 19, table), diffusion([5, 1], 19, table)) == [19, 19]
    assert writes_from(ar([5], 16, table), diffusion([5, 1], 16, table)) == [16, None]


def test_rows_that_other_groups_write_to_shared_pages_count() -> None:
    # A trunk, and a branch that shares its pages but for the last.
    assert writes_from(ar([1, 2, 3], 13, [1, 2]), ar([4], 16, [1, 2, 7])) == [13, 13]
    # A branch with pages of its own from the trunk's first row on sees nothing of it.
    assert writes_from(ar([1, 2, 3], 13, [1, 2]), ar([1, 9], 13, [1, 8])) == [13, 13]
    assert writes_from(ar([1, 2, 3], 13, [1, 2]), ar([9], 15, [1, 8])) == [13, 15]


def test_rows_that_a_branch_continues_are_written_to_its_page_too() -> None:
    # Positions 6 to 10 in pages 3 and 4; a branch from 8 on, at the start of a page; one from 10 on, and one behind that.
    main = ar([1, 2, 3, 4, 5], 6, [3, 4])
    at_start = RowGroup(View.AR, [6, 7], 8, [3, 5], 0, 2, main)
    inside = RowGroup(View.AR, [8, 9], 10, [3, 6], 0, 2, main)
    behind = RowGroup(View.AR, [10], 11, [3, 7], 0, 1, inside)
    rows = flatten([main, at_start, inside, behind], PAGE)
    written: dict[int, list[int]] = {}
    begin = 0
    for row, (slot, end) in enumerate(zip(rows.slots.tolist(), rows.more_ends.tolist(), strict=True)):
        written[row] = sorted([slot, *rows.more_slots[begin:end].tolist()])
        begin = end
    by_token = {int(rows.tokens[row]): slots for row, slots in written.items()}
    assert by_token[1] == [3 * PAGE + 6]
    assert by_token[3] == [4 * PAGE, 6 * PAGE, 7 * PAGE]
    assert by_token[4] == [4 * PAGE + 1, 6 * PAGE + 1, 7 * PAGE + 1]
    assert by_token[5] == [4 * PAGE + 2]
    assert by_token[8] == [6 * PAGE + 2, 7 * PAGE + 2]
    # Positions 0 to 5 of page 3 are not in this pass, and no branch begins in that page.
    assert rows.copies.tolist() == []
    assert [g.shared for g in rows.groups] == [0] * 4
    starts = {(g.start, tuple(g.pages)): g.writes_from for g in rows.groups}
    assert starts == {(6, (3, 4)): 6, (8, (3, 5)): 6, (10, (3, 6)): 6, (11, (3, 7)): 6}


def test_what_a_branch_sees_from_before_the_pass_is_copied() -> None:
    # From position 18 on in page 9; a branch in the same page, one on top of it, and one that begins in the next page.
    main = ar([1, 2, 3, 4, 5, 6, 7], 18, [3, 4, 9, 5])
    branch = RowGroup(View.AR, [6, 7], 20, [3, 4, 6], 0, 2, main)
    on_top = RowGroup(View.AR, [8], 21, [3, 4, 7], 0, 1, branch)
    later = RowGroup(View.AR, [8], 24, [3, 4, 9, 8], 0, 1, main)
    rows = flatten([main, branch, on_top, later, ar([1], 5, [2])], PAGE)
    assert rows.copies.tolist() == [[9, 6, 2], [9, 7, 2]]
    assert [g.shared for g in rows.groups] == [0, 16, 16, 16, 0]
