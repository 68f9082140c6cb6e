"""Turns of Orthrus' two-pass cycle."""

from orthrus.requests.request import SamplingParams
from orthrus.requests.sequence import SequenceState
from orthrus.schedules.decode_cost import DecodeCost
from orthrus.schedules.orthrus import OrthrusSchedule
from orthrus.schedules.pass_cost import PassCost
from orthrus.schedules.planner import DraftPlanner


def kinds(asked: int) -> list[str]:
    """The turns of 200 tokens where drafts pay only at times, with the schedule asked `asked` times for each."""
    cost = PassCost((1, 64), (1.0, 5.0))
    schedule = OrthrusSchedule(
        DraftPlanner(8, DecodeCost(cost, cost, cost, cost), 512), mask_token_id=9, max_model_len=512
    )
    sequence = SequenceState("a", 0, SamplingParams(temperature=0.0), 0, [1], 1, 300, frozenset())
    found: list[str] = []
    while len(sequence.tokens) < 200:
        turns = [schedule.plan(sequence, 1) for _ in range(asked)]
        assert all(turn == turns[0] for turn in turns)
        picks = [list(range(group.num_logits)) for group in turns[0].groups]
        for token in schedule.commit(sequence, turns[0], picks).tokens:
            sequence.append(token)
        found.append(turns[0].kind)
    return found


def test_a_turn_that_waits_is_planned_again_as_it_was() -> None:
    once = kinds(1)
    assert {"step", "verify"} <= set(once)
    assert kinds(3) == once
