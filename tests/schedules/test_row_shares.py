"""The rows of a pass go to the sequences that gain most from them."""

import random
import time
from pathlib import Path

import pytest

from orthrus.engine import Engine, EngineConfig
from orthrus.measure.acceptance import AcceptanceProfile
from orthrus.measure.replay import ReplaySchedule
from orthrus.requests.request import SamplingParams
from orthrus.requests.sequence import SequenceState
from orthrus.schedules.decode_cost import DecodeCost
from orthrus.schedules.orthrus import OrthrusSchedule
from orthrus.schedules.pass_cost import PassCost
from orthrus.schedules.planner import BlockPlan
from orthrus.schedules.row_shares import RowShares
from tests.checkpoints import make_checkpoint

# As a GPU's: nearly free up to 64 rows, and dearer from there on.
PASS = PassCost((1, 64, 128, 256, 512), (1.0, 1.1, 1.25, 1.8, 3.0))
COST = DecodeCost(PASS, PASS, PASS)


def sequence(number: int, temperature: float = 0.0) -> SequenceState:
    params = SamplingParams(temperature=temperature)
    return SequenceState(str(number), 0, params, 0, [1], 1, 100, frozenset())


def taught(chances: list[float], blocks: int = 40) -> tuple[RowShares, list[SequenceState]]:
    """Shares that have seen blocks of sequences whose drafts are right with these chances."""
    shares, rng = RowShares(COST, 32, 512), random.Random(0)
    sequences = [sequence(number) for number in range(len(chances))]
    for _ in range(blocks):
        for own, chance in zip(sequences, chances, strict=True):
            accepted = next((d for d in range(15) if rng.random() > chance), 15)
            shares.observe(own, 15, accepted)
    return shares, sequences


def expected(rows: int, chance: float) -> float:
    return (1 - chance**rows) / (1 - chance)


def test_sequences_that_are_right_more_often_get_longer_blocks() -> None:
    chances = [0.93] * 8 + [0.5] * 8
    shares, sequences = taught(chances)
    rows = [shares.rows(own, 16) for own in sequences]
    assert None not in rows
    lengths = [own for own in rows if own is not None]
    assert min(lengths[:8]) > 2 * max(lengths[8:]) and min(lengths) >= 2

    def rate(lengths: list[int]) -> float:
        tokens = sum(expected(own, chance) for own, chance in zip(lengths, chances, strict=True))
        return tokens / COST.cycle(sum(lengths) / 16, 16, True)

    alike = max(rate([length] * 16) for length in range(2, 33))
    assert rate(lengths) > 1.1 * alike


def test_sequences_that_are_alike_share_one_length() -> None:
    shares, sequences = taught([0.8] * 8)
    assert [shares.rows(own, 8) for own in sequences] == [None] * 8
    alone, [own] = taught([0.9])
    assert alone.rows(own, 1) is None
    assert RowShares(COST, 32, 512).rows(sequence(0), 4) is None


def test_a_pass_has_room_for_all_of_them() -> None:
    shares, sequences = taught([0.97] * 20 + [0.3] * 44)
    rows = [shares.rows(own, 64) or 8 for own in sequences]
    assert sum(rows) <= 512


SIZES = (16, 32, 64, 128, 256, 512)
PADDED = PassCost((1, 64, 128, 256, 512), (1.0, 1.1, 1.25, 1.9, 3.0), filled_to=SIZES)


class Batch:
    """Sequences that draft and verify together. The drafts of every other one are easy."""

    def __init__(self, count: int) -> None:
        self.shares = RowShares(DecodeCost(PADDED, PADDED, PADDED), 32, 512)
        # Half of them are sampled.
        self.sequences = [sequence(i, temperature=float(i % 4 >= 2)) for i in range(count)]
        self.rng = random.Random(0)

    def plan(self) -> list[int]:
        """The rows of the next blocks. They are chosen while the last ones are verified, whose result is then observed."""
        count = len(self.sequences)
        rows = [self.shares.rows(own, count) or 128 // count for own in self.sequences]
        for i, (own, length) in enumerate(zip(self.sequences, rows, strict=True)):
            chance = 0.5 if i % 2 else 0.906
            accepted = next((d for d in range(length - 1) if self.rng.random() > chance), length - 1)
            self.shares.observe(own, length - 1, accepted)
        return rows


def test_the_rows_of_a_pass_fill_a_size_that_it_is_padded_to() -> None:
    batch = Batch(16)
    for number in range(60):
        rows = batch.plan()
        if number >= 5:
            assert 100 < sum(rows) <= 128 and sum(rows[::2]) > 2 * sum(rows[1::2])


def test_sequences_that_come_do_not_make_passes_too_large() -> None:
    batch = Batch(14)
    for _ in range(10):
        batch.plan()
    for number in range(14, 17):
        # It has its first block while those of the others are already chosen.
        joins = sequence(number)
        assert 2 <= (batch.shares.rows(joins, number + 1) or 8) <= 32
        batch.sequences.append(joins)
        for _ in range(5):
            assert sum(batch.plan()) <= 128


def test_planning_takes_the_host_little_time() -> None:
    shares, sequences = taught([0.9] * 32 + [0.4] * 32)
    rng = random.Random(1)
    begin = time.process_time()
    for _ in range(20):
        for own in sequences:
            shares.rows(own, 64)
        for own in sequences:
            shares.observe(own, 7, rng.randrange(8))
    # 20 passes of 64 sequences.
    assert time.process_time() - begin < 20 * 0.01


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("shares") / "model", noise=0.05)


def test_a_mixed_batch_commits_more_for_its_rows(checkpoint: Path) -> None:
    """Half of the texts easy and half hard, in an engine that is told costs; as many tokens, from fewer rows."""
    config = EngineConfig(
        model=str(checkpoint), kv_cache_tokens=8192, prompt_lookup_max=0, max_num_seqs=8, draft_tree=0
    )
    engine = Engine.from_pretrained(config)
    params = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    rng = random.Random(0)
    prompts = [[rng.randrange(120) for _ in range(30)] for _ in range(8)]
    texts = [choices[0].token_ids for choices in engine.generate(prompts, params)]
    schedule = OrthrusSchedule.with_cost(engine.schedule_context(), COST)
    profiles = [AcceptanceProfile.constant(chance) for chance in (0.93, 0.4)]
    replay = ReplaySchedule(schedule, engine.model_config.vocab_size, profiles)
    for prompt, text in zip(prompts, texts, strict=True):
        replay.learn(prompt, params, text)
    engine.use_schedule(replay)
    chosen: list[BlockPlan] = []
    choose = OrthrusSchedule._next_block

    def record(self: OrthrusSchedule, sequence: SequenceState, batch: int) -> BlockPlan:
        chosen.append(choose(self, sequence, batch))
        return chosen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OrthrusSchedule, "_next_block", record)
        results = engine.generate(prompts, params)
    assert [choices[0].token_ids for choices in results] == texts
    per_cycle = [200 / choices[0].stats.cycles for choices in results]
    assert min(per_cycle[::2]) > 1.5 * max(per_cycle[1::2]) and min(per_cycle) > 1.1
    late = {block.rows for block in chosen[len(chosen) // 2 :]}
    assert len(late) > 1
