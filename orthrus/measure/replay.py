"""Drafts that are right as often as wished, for models whose own drafts never are: those with random weights."""

import math
import random
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from orthrus.engine import Engine
from orthrus.engine.sizing import DECODE_ROWS
from orthrus.plan import RowGroup
from orthrus.requests.request import SamplingParams
from orthrus.requests.sequence import SequenceState
from orthrus.schedules.orthrus import OrthrusSchedule
from orthrus.schedules.planner import DraftPlanner
from orthrus.schedules.protocol import Commit, Schedule, Turn

_GOLDEN = (math.sqrt(5) - 1) / 2


class ReplaySchedule:
    """Another schedule, with its draft picks replaced: passes run in full, and their drafts come from known texts.

    `learn` tells it the text that AR decoding makes of each prompt.
    """

    def __init__(self, schedule: Schedule, vocab_size: int, agreement: float, seed: int = 0) -> None:
        """agreement: chance that a draft is right if all before it are."""
        self.max_groups = schedule.max_groups
        self.max_rows, self.max_logits = schedule.max_rows, schedule.max_logits
        self._schedule = schedule
        self._vocab_size, self._seed = vocab_size, seed
        self._log_agreement = math.log(min(max(agreement, 1e-9), 1 - 1e-9))
        self._texts: dict[tuple[tuple[int, ...], int], list[int]] = {}
        # The last replayed drafts of each sequence: a turn that advances is also committed, with the same drafts.
        self._replayed: WeakKeyDictionary[SequenceState, tuple[RowGroup, list[int]]] = WeakKeyDictionary()

    def learn(self, prompt: Sequence[int], params: SamplingParams, tokens: Sequence[int]) -> None:
        """Note that AR decoding continues `prompt` with `tokens`."""
        self._texts[_key(prompt, params)] = [*prompt, *tokens]

    def plan(self, sequence: SequenceState, batch: int) -> Turn:
        return self._schedule.plan(sequence, batch)

    def commit(self, sequence: SequenceState, turn: Turn, picks: Sequence[list[int]]) -> Commit:
        return self._schedule.commit(sequence, turn, self._with_replayed(sequence, turn, picks))

    def advance(self, sequence: SequenceState, turn: Turn, placeholders: Sequence[list[int]]) -> list[int]:
        return self._schedule.advance(sequence, turn, self._with_replayed(sequence, turn, placeholders))

    def _with_replayed(
        self, sequence: SequenceState, turn: Turn, picks: Sequence[list[int]]
    ) -> list[list[int]]:
        """`picks` with those replaced that are drafts."""
        return [
            self._replay(sequence, group) if drafts else own
            for own, group, drafts in zip(picks, turn.groups, turn.drafting, strict=True)
        ]

    def _replay(self, sequence: SequenceState, block: RowGroup) -> list[int]:
        last = self._replayed.get(sequence)
        if last is None or last[0] is not block:
            last = self._replayed[sequence] = block, self._draw(sequence, block)
        return last[1]

    def _draw(self, sequence: SequenceState, block: RowGroup) -> list[int]:
        text = self._texts[_key(sequence.tokens[: sequence.num_prompt], sequence.params)]
        right = text[block.start + 1 : block.start + 1 + block.num_logits]
        # Draws that spread evenly over a sequence's cycles: a few bring what many would on average.
        first = random.Random(hash((self._seed, *text[-4:]))).random()
        draw = (first + sequence.cycles * _GOLDEN) % 1.0
        wrong = int(math.log1p(-draw) / self._log_agreement)
        tokens = [(t + (depth == wrong)) % self._vocab_size for depth, t in enumerate(right)]
        return tokens + [0] * (block.num_logits - len(tokens))


def replaying(engine: Engine, agreement: float, seed: int = 0) -> ReplaySchedule:
    """Give an Orthrus engine a schedule that replays drafts, with blocks of full length. `learn` then tells it the texts."""
    model = engine.model_config
    assert model.block_size is not None and model.mask_token_id is not None
    orthrus = OrthrusSchedule(DraftPlanner(model.block_size, None, DECODE_ROWS), model.mask_token_id)
    schedule = ReplaySchedule(orthrus, model.vocab_size, agreement, seed)
    engine.use_schedule(schedule)
    return schedule


def agreement_for(tokens_per_cycle: float, block_rows: int) -> float:
    """The chance of each draft with which a block brings so many tokens: 1 + a + a^2 + ... + a^(rows - 1)."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if sum(middle**depth for depth in range(block_rows)) < tokens_per_cycle:
            low = middle
        else:
            high = middle
    return low


def _key(prompt: Sequence[int], params: SamplingParams) -> tuple[tuple[int, ...], int]:
    # Prompts here are random: their ends tell them apart.
    assert params.greedy or params.seed is not None
    return tuple(prompt[-24:]), 0 if params.greedy or params.seed is None else params.seed
