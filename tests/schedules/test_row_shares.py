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


def sequence(number: int) -> SequenceState:
    return SequenceState(str(number), 0, SamplingParams(temperature=0.0), 0, [1], 1, 100, frozenset())


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


def test_all_sequences_of_a_pass_have_one_division() -> None:
    """What is learned meanwhile counts from the next pass on."""
    shares, sequences = taught([0.93] * 8 + [0.5] * 8)
    rows = [shares.rows(own, 16) for own in sequences]
    first = [shares.rows(own, 16) for own in sequences[:8]]
    for own in sequences[8:]:
        for _ in range(20):
            shares.observe(own, 15, 15)
    for own in sequences[:8]:
        for _ in range(20):
            shares.observe(own, 15, 0)
    assert first + [shares.rows(own, 16) for own in sequences[8:]] == rows
    after = [shares.rows(own, 16) or 0 for own in sequences]
    assert max(after[:8]) < min(after[8:])


def test_the_rows_of_a_pass_fill_a_size_that_it_is_padded_to() -> None:
    sizes = (16, 32, 64, 128, 256, 512)
    padded = PassCost((1, 64, 128, 256, 512), (1.0, 1.1, 1.25, 1.9, 3.0), filled_to=sizes)
    rng = random.Random(0)
    chances = [0.906] * 8 + [0.5] * 8
    shares, sequences = RowShares(DecodeCost(padded, padded, padded), 32, 512), [sequence(i) for i in range(16)]
    for number in range(60):
        rows = [shares.rows(own, 16) or 8 for own in sequences]
        for own, length, chance in zip(sequences, rows, chances, strict=True):
            accepted = next((d for d in range(length - 1) if rng.random() > chance), length - 1)
            shares.observe(own, length - 1, accepted)
        if number >= 5:
            assert 100 < sum(rows) <= 128 and sum(rows[:8]) > 2 * sum(rows[8:])


def test_planning_takes_the_host_little_time() -> None:
    shares, sequences = taught([0.9] * 32 + [0.4] * 32)
    begin = time.process_time()
    for _ in range(20):
        for own in sequences:
            shares.rows(own, 64)
    # 20 passes of 64 sequences. The sort that this replaces took some 10 ms a pass.
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
