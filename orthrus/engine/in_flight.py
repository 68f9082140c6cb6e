"""`InFlight`: what the engine keeps of a pass from its launch until its picks are read."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from orthrus.engine.scheduler import Planned
from orthrus.runner.protocol import LaunchedPass
from orthrus.runner.sampler import PickRows


@dataclass(slots=True)
class InFlight:
    """A pass whose picks have not been read."""

    planned: list[Planned]
    rows: list[PickRows]
    """How its picks are made."""
    launched: LaunchedPass
    ahead: bool
    """Whether its sequences go on before its picks are known, so that the next pass can be launched before it is over."""
    begin: float
    """When it was launched, in seconds; for the observer."""


def placeholders_of(planned: Sequence[Planned], first_pick: int) -> Iterator[list[list[int]]]:
    """For each part of a pass, by group, what `RowGroup.tokens` may have in place of the group's picks.

    first_pick: `LaunchedPass.first_pick`. Picks of further ranks come behind the first ones of all groups.
    """
    place = -1 - first_pick
    further = place - sum(part.num_logits for part in planned)
    for part in planned:
        groups: list[list[int]] = []
        for group, drafting in zip(part.turn.groups, part.turn.drafting, strict=True):
            end = place - group.num_logits
            further_end = further - (part.turn.ranks - 1) * group.num_logits if drafting else further
            groups.append([*range(place, end, -1), *range(further, further_end, -1)])
            place, further = end, further_end
        yield groups
