"""Drafts that are right at a given rate, for models with random weights, whose own drafts are never right."""

import math
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple
from weakref import WeakKeyDictionary

from orthrus.engine import Engine
from orthrus.measure.acceptance import AcceptanceProfile
from orthrus.plan import RowGroup, num_right
from orthrus.requests.request import SamplingParams
from orthrus.requests.sequence import SequenceState
from orthrus.schedules.ar import STEP
from orthrus.schedules.blocks import LEAD_DRAFT
from orthrus.schedules.orthrus import OrthrusSchedule
from orthrus.schedules.protocol import Commit, Schedule, Turn

_OFF_CHAIN = 0.5
"""The factor on the likeliest token's chance after a token that was not the likeliest one. As with orthrus-tiny."""
_GOLDEN = (math.sqrt(5) - 1) / 2
_Block = tuple[RowGroup, list[int], list[int]]
"""A block, the right tokens after its rows, as far as they are known, and the rank that each is to have: 0 is the likeliest."""


class _Text(NamedTuple):
    """A text that drafts are replayed from."""

    profile: AcceptanceProfile
    tokens: list[int]
    """The prompt's and the completion's."""
    falling: list[float]
    """Minus the chance that the first 1, 2, ... drafts of a block are all right: ascending, for `bisect`."""
    first_draw: float


class ReplaySchedule:
    """Another schedule, with its draft picks replaced: passes run in full, and their drafts come from known texts.

    `learn` must first be called with the text that AR decoding makes of each prompt.
    """

    def __init__(
        self, schedule: Schedule, vocab_size: int, profiles: Sequence[AcceptanceProfile], seed: int = 0
    ) -> None:
        """profiles: how often drafts are right. Texts get them in turn, in the order in which they are learned."""
        self.max_groups = schedule.max_groups
        self.max_rows, self.max_logits = schedule.max_rows, schedule.max_logits
        self._schedule = schedule
        self._vocab_size, self._seed = vocab_size, seed
        self._profiles = profiles
        self._texts: dict[tuple[tuple[int, ...], int], _Text] = {}
        # The text of each sequence, found once: the time of replaying should be no part of what is measured.
        self._found: WeakKeyDictionary[SequenceState, _Text] = WeakKeyDictionary()
        # The last block of each sequence: a turn that advances is also committed, with the same drafts.
        self._blocks: WeakKeyDictionary[SequenceState, _Block] = WeakKeyDictionary()

    def learn(self, prompt: Sequence[int], params: SamplingParams, tokens: Sequence[int]) -> None:
        """Remember that AR decoding continues `prompt` with `tokens`, if no longer text is known."""
        key = _key(prompt, params)
        known = self._texts.get(key)
        if known is not None and len(known.tokens) > len(prompt) + len(tokens):
            return
        profile = known.profile if known else self._profiles[len(self._texts) % len(self._profiles)]
        text = [*prompt, *tokens]
        falling = [-chance for chance in profile.reached(self.max_rows)]
        first_draw = random.Random(hash((self._seed, *text[-4:]))).random()
        self._texts[key] = _Text(profile, text, falling, first_draw)

    def plan(self, sequence: SequenceState, batch: int) -> Turn:
        return self._schedule.plan(sequence, batch)

    def commit(self, sequence: SequenceState, turn: Turn, picks: Sequence[list[int]]) -> Commit:
        return self._schedule.commit(sequence, turn, self._with_replayed(sequence, turn, picks))

    def advance(self, sequence: SequenceState, turn: Turn, placeholders: Sequence[list[int]]) -> list[int]:
        return self._schedule.advance(sequence, turn, self._with_replayed(sequence, turn, placeholders))

    def _with_replayed(
        self, sequence: SequenceState, turn: Turn, picks: Sequence[list[int]]
    ) -> Sequence[list[int]]:
        """`picks`, in which all drafts are replaced."""
        if turn.kind == STEP:
            return picks
        return [
            self._replay(sequence, turn, group, len(own))
            if drafts
            else self._replay_heads(sequence, group, own)
            for own, group, drafts in zip(picks, turn.groups, turn.drafting, strict=True)
        ]

    def _replay_heads(self, sequence: SequenceState, group: RowGroup, picks: list[int]) -> list[int]:
        """The picks of rows that verify drafts, in which the drafts of Medusa heads are replaced."""
        if not group.heads:
            return picks
        rows = picks[: group.num_logits]
        # The row behind the last right draft has picked the next token itself.
        start = group.start + num_right(group.tokens[1:], rows) + 2
        right, ranks = self._draw(sequence, start, group.heads, chain=True)
        drafts = [(token + (rank != 0)) % self._vocab_size for token, rank in zip(right, ranks, strict=True)]
        return [*rows, *drafts, *[0] * (group.heads - len(drafts))]

    def _replay(self, sequence: SequenceState, turn: Turn, block: RowGroup, count: int) -> list[int]:
        """`count` picks of a block: the likeliest token of every row, then the second likeliest of every row, and so on."""
        num_ranks = count // max(1, block.num_logits)
        last = self._blocks.get(sequence)
        if last is None or last[0] is not block:
            # Not `block.start`: a block behind a verify turn in flight is planned for the furthest position.
            start = sequence.newest_position + 1
            # Behind a lead, drafts are verified even if the block's first pick was wrong.
            chain = num_ranks == 1 and turn.kind != LEAD_DRAFT
            last = self._blocks[sequence] = block, *self._draw(sequence, start, block.num_logits, chain)
        _, right, ranks = last
        picks: list[int] = []
        for rank in range(num_ranks):
            # The right token at its rank, and a different wrong token at each other rank.
            picks += [
                token if own == rank else (token + 1 + rank) % self._vocab_size
                for token, own in zip(right, ranks, strict=True)
            ]
            picks += [0] * (block.num_logits - len(right))
        return picks

    def _draw(
        self, sequence: SequenceState, start: int, count: int, chain: bool
    ) -> tuple[list[int], list[int]]:
        """The right tokens at `count` positions from `start` on, as far as the text goes, and the rank that each is to have.

        chain: whether nothing reads the drafts after the first wrong one. Then these are all wrong, which takes no time to draw.
        """
        text = self._found.get(sequence)
        if text is None:
            prompt = sequence.tokens[: sequence.num_prompt]
            text = self._found[sequence] = self._texts[_key(prompt, sequence.params)]
        right = text.tokens[start : start + count]
        # Low-discrepancy draws over a sequence's cycles: a few cycles come close to the average of many.
        draw = 1.0 - (text.first_draw + sequence.cycles * _GOLDEN) % 1.0
        num_right = bisect_right(text.falling, -draw, hi=min(len(right), len(text.falling)))
        ranks = [0] * num_right
        if chain:
            return right, ranks + [-1] * (len(right) - num_right)
        rng = random.Random(hash((self._seed, *text.tokens[-4:], sequence.cycles)))
        for depth in range(num_right, len(right)):
            likeliest, *others = text.profile.at(depth)
            # The chain's first wrong draft can't be right. The drafts after it matter to trees, and behind a lead.
            likeliest *= 0.0 if depth == num_right else _OFF_CHAIN
            unknown = 1.0 - text.profile.at(depth)[0] if depth == num_right else 1.0 - likeliest
            weights = [likeliest, *others, max(0.0, unknown - sum(others)) + 1e-9]
            ranks += rng.choices([*range(len(weights) - 1), -1], weights)
        return right, ranks


def replaying(
    engine: Engine,
    *profiles: AcceptanceProfile,
    adaptive: bool = False,
    block_rows: int | None = None,
    seed: int = 0,
) -> ReplaySchedule:
    """Give an Orthrus engine a schedule that replays drafts. Call its `learn` with the texts before decoding.

    adaptive: plan blocks as a server does, which first measures what passes cost. Otherwise all blocks have `block_rows` rows, or
    the model's block size.
    """
    context = engine.schedule_context()
    settings = {"adaptive_draft": adaptive, "draft_length": block_rows}
    own = OrthrusSchedule.build(replace(context, config=context.config.model_copy(update=settings)))
    schedule = ReplaySchedule(own, engine.model_config.vocab_size, profiles, seed)
    engine.use_schedule(schedule)
    return schedule


def _key(prompt: Sequence[int], params: SamplingParams) -> tuple[tuple[int, ...], int]:
    # Prompts here are random, so their ends are different.
    assert params.greedy or params.seed is not None
    return tuple(prompt[-24:]), 0 if params.greedy or params.seed is None else params.seed
