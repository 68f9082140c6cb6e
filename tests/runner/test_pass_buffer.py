"""The numbers of a pass in one buffer: the host's view and the device's are of the same fields, none of which overlap."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from orthrus.kernels.attention.place_blocks import place_blocks
from orthrus.kernels.attention.work_list import plan_work
from orthrus.plan import MORE_SLOTS, RowGroup, Verifying, View, flatten
from orthrus.requests.request import SamplingParams
from orthrus.runner.pass_buffer import PassBuffer, PassFields, buffer_size
from orthrus.runner.sampler import PickRows, row_keys, row_temperatures
from tests.kernels.work_lists import items_of

MAX_ROWS, MAX_LOGITS, MAX_WORK, PAGE = 32, 16, 100, 8
NAMES = [field.name for field in fields(PassFields)]


def buffer() -> PassBuffer:
    size = buffer_size(max_rows=MAX_ROWS, max_logits=MAX_LOGITS, max_work=MAX_WORK)
    return PassBuffer(size, MAX_LOGITS, pinned=False)


def upload(host: PassBuffer, used: int) -> torch.Tensor:
    """As a device gets it: what is used, on top of whatever was there."""
    device = torch.full((host.size,), -7, dtype=torch.int32)
    device[:used] = host.numbers[:used]
    return device


@pytest.mark.parametrize("num_rows", [8, 16, MAX_ROWS])
def test_every_field_is_the_same_in_both_views_and_none_overlap(num_rows: int) -> None:
    host = buffer()
    ours = host.fields(num_rows)
    for number, name in enumerate(NAMES):
        getattr(ours, name)[...] = number + 1
    theirs = PassFields.of(host.numbers, num_rows, MAX_LOGITS)
    for number, name in enumerate(NAMES):
        ours_now, theirs_now = getattr(ours, name), getattr(theirs, name)
        # Writing the fields after it has changed no number of it.
        assert (ours_now == number + 1).all(), name
        assert torch.equal(theirs_now, torch.from_numpy(ours_now)), name
        assert theirs_now.shape == ours_now.shape, name
        assert theirs_now.data_ptr() == ours_now.ctypes.data, name
    assert sum(getattr(ours, name).size for name in NAMES) == host.size - 2  # Two are unused.
    assert ours.work.size >= MAX_WORK + (4 + MORE_SLOTS) * (MAX_ROWS - num_rows)


def test_a_device_finds_in_the_buffer_what_the_host_has_put_there() -> None:
    groups = [
        RowGroup(View.DIFFUSION, [9, 1, 1], 12, [4, 2], 0, 2),
        RowGroup(View.AR, [5], 30, [1, 2, 3, 4], 0, 1),
    ]
    picking = [
        PickRows(SamplingParams(temperature=0.7), seed=3, position=13, count=2, drafting=True),
        PickRows(SamplingParams(temperature=0.0), seed=4, position=31, count=1),
    ]
    rows, work, host = flatten(groups, PAGE), np.arange(40, dtype=np.int32), buffer()
    # What an earlier, larger pass has left must not show.
    host.numbers.fill_(99)
    filled = host.fill(rows, picking, work, num_rows=8, first_pick=16, wants_logits=True)
    used = int(filled.num_used[0])
    assert used == host.size - filled.work.size + 40
    device = PassFields.of(upload(host, used), 8, MAX_LOGITS)
    single = {name: getattr(device, name).tolist() for name in NAMES[:10]}
    assert single == {
        "num_ar": [1],
        "first_pick": [16],
        "wants_logits": [1],
        "num_rows": [8],
        "num_logits": [3],
        "num_copies": [0],
        "copies_at": [40],
        "num_used": [used],
        "num_moving": [0],
        "moving_at": [40],
    }
    assert device.tokens.tolist() == [5, 9, 1, 1, 0, 0, 0, 0]
    assert device.positions.tolist() == [30, 12, 13, 14, 0, 0, 0, 0]
    assert device.slots.tolist() == [4 * PAGE + 6, 0, 0, 0, 0, 0, 0, 0]
    assert device.logit_rows.tolist() == [1, 2, 0] + [0] * (MAX_LOGITS - 3)
    assert device.temperatures.dtype == torch.float32
    assert torch.equal(device.temperatures[:3], torch.from_numpy(row_temperatures(picking)))
    assert torch.equal(device.noise_keys[:3], torch.from_numpy(row_keys(picking)))
    assert device.work[:40].tolist() == list(range(40))
    assert device.work[40:].unique().tolist() == [-7]


@pytest.mark.parametrize("right", range(4))
def test_a_block_behind_drafts_in_flight_is_moved_behind_the_right_ones(right: int) -> None:
    """The device's buffer is that of a pass whose block is planned where it belongs, but for the keys of the work list."""
    drafts, first_pick, furthest = [7, 8, 9], 20, 12
    picks = torch.zeros(60, dtype=torch.int32)
    picks[first_pick : first_pick + 4] = torch.tensor([*drafts[:right], 5, 5, 5, 5][:4])
    other = RowGroup(View.DIFFUSION, [3, 1], 9, [6, 7], 0, 1)

    def filled(group: RowGroup, position: int) -> tuple[PassFields[torch.Tensor], int]:
        host = buffer()
        groups = [other, group, other]
        picking = [
            PickRows(SamplingParams(temperature=0.0), seed=1, position=10, count=1, drafting=True),
            PickRows(SamplingParams(temperature=0.7), seed=3, position=position, count=2, drafting=True),
            PickRows(SamplingParams(temperature=0.5), seed=4, position=10, count=1, drafting=True),
        ]
        rows = flatten(groups, PAGE)
        work = plan_work(rows.groups, tile_rows=2, shared=False, programs=1, capacity=0)
        fields = host.fill(rows, picking, work, num_rows=8, first_pick=0, wants_logits=False)
        used, at = int(fields.num_used[0]), int(fields.moving_at[0])
        return PassFields.of(upload(host, used), 8, MAX_LOGITS), at

    block = RowGroup(View.DIFFUSION, [0, 1, 1], furthest, [4, 2], 0, 2, behind=Verifying(drafts, first_pick))
    got, at = filled(block, furthest + 1)
    place_blocks(got.work[at:], 1, picks, got.tokens, got.positions, got.noise_keys, got.work)
    start = furthest - len(drafts) + right
    known = replace(block, tokens=[-1 - (first_pick + right), 1, 1], start=start, behind=None)
    expected, _ = filled(known, start + 1)
    for name in ("tokens", "positions", "slots", "noise_keys", "logit_rows", "temperatures"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    theirs, ours = (items_of(fields.work.numpy()) for fields in (expected, got))
    assert (ours["num_keys"] - ours["unseen"]).tolist() == theirs["num_keys"].tolist()
    assert ours["unseen"].max() == len(drafts) - right


def test_rows_without_a_group_are_of_the_view_that_comes_last() -> None:
    def num_ar(*groups: RowGroup) -> int:
        filled = buffer().fill(
            flatten(groups, PAGE), [], np.zeros(8, np.int32), num_rows=16, first_pick=0, wants_logits=False
        )
        return int(filled.num_ar[0])

    ar, block = RowGroup(View.AR, [1, 2], 3, [1], 0, 2), RowGroup(View.DIFFUSION, [1, 2, 3], 5, [1], 0, 2)
    assert num_ar(ar) == 16
    assert num_ar(ar, block) == 2
    assert num_ar(block) == 0


def test_a_pass_that_does_not_fit_is_refused_by_the_limit_that_it_exceeds() -> None:
    def fill(num_rows: int, num_logits: int, num_work: int) -> None:
        group = RowGroup(View.AR, [1] * num_rows, 0, [1, 2, 3, 4, 5], 0, num_logits)
        work = np.zeros(num_work, np.int32)
        buffer().fill(flatten([group], PAGE), [], work, num_rows=MAX_ROWS, first_pick=0, wants_logits=False)

    fill(MAX_ROWS, MAX_LOGITS, MAX_WORK)
    with pytest.raises(ValueError, match="33 rows is over its limit, 32"):
        fill(MAX_ROWS + 1, MAX_LOGITS, MAX_WORK)
    with pytest.raises(ValueError, match="17 rows that need logits is over the limit, 16"):
        fill(MAX_ROWS, MAX_LOGITS + 1, MAX_WORK)
    with pytest.raises(ValueError, match=r"work list has 101 numbers.*room for 100"):
        fill(MAX_ROWS, MAX_LOGITS, MAX_WORK + 1)
