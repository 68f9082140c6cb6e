"""The drafts of Medusa heads, made in the pass that verifies the drafts before them.

The heads read one row of each group: that of the last right draft, or of the newest token if no draft is right. Which row that
is follows from the picks of the rows. It is found on the device, so that the heads need not wait for the host.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from orthrus.kernels.device import to_device
from orthrus.kernels.rows.types import NO_TOKEN
from orthrus.models.forward import LayerParallelForward
from orthrus.runner.sampler import PickRows, adjust, keys_from, pick_adjusted, runs

_NO_DRAFT = NO_TOKEN - 1
"""Stands for drafts that a group does not have: no pick equals it."""


def head_picks(
    forward: LayerParallelForward, hidden: Tensor, picks: Tensor, groups: Sequence[PickRows]
) -> Tensor:
    """The tokens that heads draft: int32 [sum of `PickRows.heads`], by group and then by head. `NO_TOKEN` where there is none.

    hidden [rows, hidden_size], picks int [rows]: the final hidden states and the picks of the rows of all `groups`, in order.
    A draft is picked with the noise of its own position and the filters of its group. Masks and penalties that depend on the
    tokens before it are left out, which costs acceptance only. Does not wait for the device.
    """
    device, count = hidden.device, forward.num_medusa_heads
    first_rows = np.cumsum([0, *(group.count for group in groups)])
    wanted = [(int(first), group) for first, group in zip(first_rows, groups, strict=False) if group.heads]
    most = max(group.count for _, group in wanted)
    first = to_device(torch.tensor([row for row, _ in wanted]), device)
    drafts = np.full((len(wanted), most - 1), _NO_DRAFT)
    for own, (_, group) in zip(drafts, wanted, strict=True):
        own[: len(group.draft_tokens)] = group.draft_tokens
    places = (first[:, None] + torch.arange(most - 1, device=device)).clamp(max=len(picks) - 1)
    # [groups]: how many drafts come before the first wrong one.
    right = (picks[places] == to_device(torch.from_numpy(drafts), device)).long().cumprod(1).sum(1)
    logits = forward.medusa_logits(hidden[first + right]).flatten(0, 1)
    rows = [
        replace(group, count=count, position=group.position + 1, heads=0, draft_tokens=(), drafting=True)
        for _, group in wanted
    ]
    positions = most - 1 + count
    keys = keys_from(
        [group.seed for group in rows], [group.position for group in rows], [positions] * len(rows)
    )
    by_position = to_device(torch.from_numpy(keys), device).view(len(rows), positions, 2)
    own_positions = right[:, None] + torch.arange(count, device=device)
    own_keys = by_position.gather(1, own_positions[..., None].expand(-1, -1, 2)).flatten(0, 1)
    found = [
        pick_adjusted(adjust(logits[place], run), run, own_keys[place]).int() for place, run in runs(rows)
    ]
    return torch.cat(found)
