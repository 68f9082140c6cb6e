"""`InFlight`: what the engine keeps of a pass from its launch until its picks are read, and how sequences go on meanwhile."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from orthrus.engine.planned_turn import PlannedTurn
from orthrus.engine.scheduler import Scheduler
from orthrus.runner.protocol import LaunchedPass
from orthrus.runner.sampler import PickRows
from orthrus.schedules.protocol import PassTime


@dataclass(slots=True)
class InFlight:
    """A pass whose picks have not been read."""

    planned: list[PlannedTurn]
    rows: list[PickRows]
    """How its picks are made."""
    launched: LaunchedPass
    ahead: bool
    """Whether its sequences go on before its picks are known, so that the next pass can be launched before it is over."""
    begin: float
    """When it was launched, by `time.perf_counter`, in seconds."""


def tell_time(
    watchers: Sequence[Callable[[PassTime], None]], planned: Sequence[PlannedTurn], seconds: float
) -> None:
    """Report the time of a pass to `watchers`, if all its turns are of one kind."""
    kinds = {part.turn.kind for part in planned}
    if len(kinds) != 1:
        return
    rows = sum([part.num_rows for part in planned])
    groups = sum([len(part.turn.groups) for part in planned])
    time = PassTime(kinds.pop(), rows, groups, len(planned), seconds)
    for watcher in watchers:
        watcher(time)


def advance(last: InFlight, scheduler: Scheduler) -> None:
    """Let the sequences of the pass in flight go on as far as they can before its picks are known.

    All passes before it have been committed.
    """
    placeholders = placeholders_of(last.planned, last.launched.first_pick)
    for part, own in zip(last.planned, placeholders, strict=True):
        sequence = part.sequence
        if sequence.finish_reason is not None:
            continue
        tokens = own[0]
        if part.decoding:
            tokens = scheduler.schedule_of(sequence).advance(sequence, part.turn, own)
            scheduler.mark_computed(sequence, len(tokens))
        sequence.placeholders += tokens
        part.num_advanced = len(tokens)


def placeholders_of(planned: Sequence[PlannedTurn], first_pick: int) -> Iterator[list[list[int]]]:
    """For each part of a pass, by group: the placeholders of the group's picks, as `RowGroup.tokens` has them.

    first_pick: `LaunchedPass.first_pick`. The picks of rank 0 of all groups come first, and then those of further ranks.
    """
    place = -1 - first_pick
    further = place - sum([part.num_logits for part in planned])
    for part in planned:
        groups: list[list[int]] = []
        for group, drafting in zip(part.turn.groups, part.turn.drafting, strict=True):
            end = place - group.num_logits
            own = [*range(place, end, -1)]
            if drafting and part.turn.ranks > 1:
                further_end = further - (part.turn.ranks - 1) * group.num_logits
                own += range(further, further_end, -1)
                further = further_end
            groups.append(own)
            place = end
        yield groups
