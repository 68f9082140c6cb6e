"""The benchmark's replayed drafts are right as often as asked, on a small shape. The measurements themselves need a GPU."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from orthrus.errors import ConfigError
from orthrus.measure.acceptance import AcceptanceProfile, chain_profile
from orthrus.measure.contest import Ratio, engine_contestant
from orthrus.measure.prompt_time import prompt_operations, prompt_times
from orthrus.measure.random_model import QUANTISED, shape_config, shape_engine
from orthrus.measure.replay import ReplaySchedule, replaying
from orthrus.measure.shape_bench import (
    ShapeBenchOptions,
    acceptances,
    all_races,
    pass_times,
    shape_bench,
)
from orthrus.measure.shape_race import recorded, scheduled
from orthrus.measure.shape_report import PassTime, PromptTime, ShapeReport, Speed, plot
from orthrus.plan import RowGroup, View
from orthrus.requests.request import SamplingParams
from orthrus.requests.sequence import SequenceState
from orthrus.schedules.ar import ARSchedule
from orthrus.schedules.protocol import Commit, Turn

GREEDY = SamplingParams(temperature=0.0)
CPU = torch.device("cpu")
SMALL = replace(
    shape_config("0.6B"),
    vocab_size=500,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
    block_size=8,
    mask_token_id=499,
)


SETTINGS: dict[str, Any] = {"kv_cache_tokens": 4096, "max_model_len": 512, "max_num_seqs": 8}


def test_a_profile_is_scaled_to_tokens_per_cycle(tmp_path: Path) -> None:
    falling = AcceptanceProfile(tuple((0.9**depth, 0.05) for depth in range(1, 10)), "measured")
    for wanted in (1.5, 5.0, 10.6):
        assert chain_profile(wanted, 32).tokens_per_cycle(32) == pytest.approx(wanted)
        scaled = falling.scaled(wanted, 32)
        assert scaled.tokens_per_cycle(32) == pytest.approx(wanted)
        # It still falls with depth, and every chance stays one.
        assert [first for first, _ in scaled.chances] == sorted((f for f, _ in scaled.chances), reverse=True)
        assert all(sum(depth) <= 1 for depth in scaled.chances)
        scaled.write(tmp_path / "profile.json")
        read = AcceptanceProfile.read(tmp_path / "profile.json")
        assert read.source == scaled.source == f"measured, scaled to {wanted:g}"
        assert read.tokens_per_cycle(32) == pytest.approx(wanted, rel=0.01)
    for impossible in (1.0, 32.0):
        with pytest.raises(ConfigError, match="below the block's 32 rows"):
            falling.scaled(impossible, 32)


@pytest.mark.parametrize("text", ["", "[]", '{"chances": [[0.9, 0.2]], "source": "x"}', '{"chances": []}'])
def test_a_file_that_is_no_profile_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "profile.json").write_text(text)
    with pytest.raises(ConfigError, match=r"profile\.json"):
        AcceptanceProfile.read(tmp_path / "profile.json")


def test_replayed_drafts_give_the_tokens_per_cycle_asked_for_and_change_no_token() -> None:
    ar = shape_engine(SMALL, "ar", CPU, torch.float32, **SETTINGS)
    orthrus = shape_engine(SMALL, "orthrus", CPU, torch.float32, **SETTINGS)
    prompts = [
        torch.randint(400, (30,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(6)
    ]
    params = [
        SamplingParams(temperature=i % 2, seed=i, max_tokens=200, ignore_eos=True)
        for i in range(len(prompts))
    ]
    expected = ar.generate(prompts, params)
    assert len({token for [c] in expected for token in c.token_ids}) > 150, "such text proves little"
    for profiles in ([chain_profile(4.0, 8)], [chain_profile(6.0, 8), chain_profile(2.0, 8)]):
        schedule = replaying(orthrus, *profiles)
        for prompt, one, [completion] in zip(prompts, params, expected, strict=True):
            schedule.learn(prompt, one, completion.token_ids)
        got = orthrus.generate(prompts, params)
        assert [c.token_ids for [c] in got] == [c.token_ids for [c] in expected]
        for first, profile in enumerate(profiles):
            stats = [c.stats for [c] in got[first :: len(profiles)]]
            tokens = sum(s.completion_tokens - 1 for s in stats) / sum(s.cycles for s in stats)
            assert tokens == pytest.approx(profile.tokens_per_cycle(8), rel=0.08)


class _Ranked:
    """A schedule whose blocks pick three tokens a row; it keeps the picks."""

    max_groups, max_rows, max_logits = 1, 8, 8

    def __init__(self) -> None:
        self.picks: list[list[int]] = []

    def plan(self, sequence: SequenceState, batch: int) -> Turn:
        block = RowGroup(View.DIFFUSION, [0] * 8, len(sequence.tokens) - 1, [], 0, 7)
        return Turn("draft", (block,), (True,), ends_cycle=False)

    def commit(self, sequence: SequenceState, turn: Turn, picks: Sequence[list[int]]) -> Commit:
        self.picks += picks
        return Commit([])

    def advance(self, sequence: SequenceState, turn: Turn, placeholders: Sequence[list[int]]) -> list[int]:
        return []


def test_picks_by_rank_are_right_as_often_as_the_profile_says() -> None:
    """Picks are ordered by rank: the likeliest tokens of all rows come first."""
    inner = _Ranked()
    schedule = ReplaySchedule(inner, 500, [AcceptanceProfile(((0.5, 0.3, 0.1),), "made up")])
    text = list(range(100, 120))
    schedule.learn([1, 2, 3], GREEDY, text)
    sequence = SequenceState("r", 0, GREEDY, 0, [1, 2, 3, *text[:1]], 3, 100, frozenset())
    ranks = []
    for cycle in range(2000):
        sequence.cycles = cycle
        schedule.commit(sequence, schedule.plan(sequence, 1), [[0] * 21])
        picks = inner.picks[-1]
        by_rank = [picks[rank * 7 : (rank + 1) * 7] for rank in range(3)]
        for depth in range(7):
            assert len({row[depth] for row in by_rank}) == 3
        ranks.append(next((r for r in range(3) if by_rank[r][0] == text[1]), None))
    for rank, chance in enumerate((0.5, 0.3, 0.1)):
        assert ranks.count(rank) / len(ranks) == pytest.approx(chance, abs=0.04)


def test_the_races_replay_each_acceptance_by_the_planner_and_by_fixed_blocks() -> None:
    options = ShapeBenchOptions(
        batches=(1, 2), context=32, new_tokens=40, rounds=1, tokens_per_cycle=(5.0, 2.5), mixed_batch=2
    )
    engine = shape_engine(SMALL, "orthrus", CPU, torch.float32, **SETTINGS)
    speeds, exact = all_races(engine, options, acceptances(options, 8), (), lambda line: None)
    assert exact
    at = ["ar", "orthrus at 5", "8 rows at 5", "orthrus at 2.5", "8 rows at 2.5"]
    mixed = [f"{one} at 5 and 2" for one in ("orthrus", "4 rows", "8 rows")]
    assert [(s.batch, s.contestant) for s in speeds] == [
        *((batch, name) for batch in (1, 2) for name in at),
        *((2, name) for name in mixed),
    ]
    for speed in speeds:
        if speed.contestant == "ar":
            assert speed.tokens_per_cycle == 1.0 and speed.over_ar.median == 1.0
        elif speed.contestant == "8 rows at 5":
            assert speed.tokens_per_cycle == pytest.approx(5.0, abs=1.2)
        elif speed.contestant == "8 rows at 2.5":
            assert speed.tokens_per_cycle == pytest.approx(2.5, abs=0.5)


def test_a_draft_pass_is_compared_with_the_bytes_of_its_own_weights() -> None:
    """Also where the engine chose them itself, and the setting says "auto"."""
    engine = shape_engine(SMALL, "orthrus", CPU, torch.float32, **SETTINGS, draft_weights="fp8")
    engine.config = engine.config.model_copy(update={"draft_weights": "auto"})
    _, verify, draft = pass_times(engine, ShapeBenchOptions(batches=(1,), context=64), read=1.0)
    read = [each.share_of_read * each.milliseconds for each in (verify, draft)]
    assert 0.5 < read[1] / read[0] < 0.9, "half the bytes of the weights, and all of the cache's"


@pytest.mark.parametrize(("quantised", "more"), [(None, 0.0), ("fp8", 0.5), ("int4", 0.75)])
def test_a_quantised_models_draft_pass_reads_projections_in_full(quantised: str | None, more: float) -> None:
    """more: the share of their 16 bits that the AR view's projections save."""
    model = replace(
        SMALL,
        vocab_size=128,
        mask_token_id=127,
        hidden_size=256,
        intermediate_size=512,
        head_dim=64,
        quantization=None if quantised is None else QUANTISED[quantised],
    )
    engine = shape_engine(model, "orthrus", CPU, torch.float32, **SETTINGS)
    _, verify, draft = pass_times(engine, ShapeBenchOptions(batches=(1,), context=64), read=1.0)
    read = [each.share_of_read * each.milliseconds * 1e6 for each in (verify, draft)]
    # Queries and the output: 4 heads of 64. Keys and values: 2 heads.
    projections = model.num_hidden_layers * 256 * (4 + 4 + 2 + 2) * 64
    assert read[1] - read[0] == pytest.approx(2 * projections * more, rel=0.05, abs=1)


def test_prompts_are_timed_beside_their_arithmetic() -> None:
    engine = shape_engine(SMALL, "ar", CPU, torch.float32, **SETTINGS)
    [short] = prompt_times(engine, [64, 4096], rate=1e9)
    assert short.tokens == 64 and short.milliseconds > 0
    # 2 layers; queries and output of 4 heads, keys and values of 2, three matrices of the MLP; attention to earlier tokens.
    operations = 2 * (2 * 64 * 32 * (2 * 32 + 2 * 16 + 3 * 64) + 2 * 32 * 64 * 64)
    assert prompt_operations(SMALL, 64) == operations
    assert short.over_floor == pytest.approx(short.milliseconds * 1e6 / operations)


def test_a_report_reads_as_text_json_and_picture(tmp_path: Path) -> None:
    ratio = Ratio(4.5, 4.4, 4.6)
    report = ShapeReport(
        shape="8B",
        hardware="a GPU",
        torch="2.13",
        context=1024,
        new_tokens=128,
        replayed=("measured, scaled to 10.6",),
        read_gbps=4400.0,
        passes=(PassTime("ar step, batch 1", 4.1, 0.84),),
        prompts=(PromptTime(2048, 49.8, 1.34),),
        speeds=(Speed("orthrus", 1, 1100.0, ratio, None, 10.6), Speed("ar", 1, 240.0, ratio, ratio, 1.0)),
        exact=False,
        weights_gib=17.9,
        memory_over=0.04,
    )
    text = report.to_text()
    assert "replayed from the AR text: measured, scaled to 10.6" in text and "1.34 x the arithmetic" in text
    assert "84% of the bandwidth" in text and "4.50x (4.40-4.60)" in text and "DIFFER" in text
    assert json.loads(report.to_json())["passes"][0]["milliseconds"] == 4.1
    plot(report, tmp_path / "bench.svg")
    assert (tmp_path / "bench.svg").stat().st_size > 5000


def test_unknown_shapes_and_machines_without_a_gpu_are_refused() -> None:
    with pytest.raises(ConfigError, match="use one of"):
        shape_config("9B")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="GPU"):
            shape_bench(ShapeBenchOptions())


def test_tokens_are_counted_while_all_texts_are_decoded() -> None:
    """Of AR decoding those are all. With drafts some texts end sooner, and the rest of the others does not count."""
    easy, hard = chain_profile(6.0, 8), chain_profile(1.5, 8)
    engine = shape_engine(SMALL, "orthrus", CPU, torch.float32, **SETTINGS)
    replayed = replaying(engine, easy, hard, block_rows=8)
    contestants = [
        recorded(scheduled("ar", engine, ARSchedule()), [replayed]),
        scheduled("orthrus", engine, replayed),
    ]
    prompts = [[*range(100, 130), i + 1] for i in range(4)]
    ar, orthrus = (contestant.run(prompts, 60) for contestant in contestants)
    assert orthrus.token_ids == ar.token_ids
    assert ar.together is not None and ar.together.tokens == 4 * 59
    assert orthrus.together is not None
    # The texts that draft well have all their tokens by then, the others about a quarter.
    assert 2 * 59 < orthrus.together.tokens < 3 * 59
    assert orthrus.together.seconds > 0
    assert engine_contestant(engine).run(prompts, 1).together is None, "they end with their first token"


@pytest.mark.parametrize("lead", [False, True])
def test_replayed_drafts_are_as_good_behind_a_lead(lead: bool) -> None:
    """A lead commits a token more in each cycle. It also rescues the drafts of a block whose first pick is wrong."""
    engine = shape_engine(SMALL, "orthrus", CPU, torch.float32, draft_lead=lead, **SETTINGS)
    replayed = replaying(engine, chain_profile(2.0, 8), block_rows=8)
    prompts = [[*range(100, 130), i + 1] for i in range(6)]
    ar = recorded(scheduled("ar", engine, ARSchedule()), [replayed]).run(prompts, 200)
    output = scheduled("orthrus", engine, replayed).run(prompts, 200)
    assert output.token_ids == ar.token_ids
    assert output.tokens_per_cycle == pytest.approx(2.7 if lead else 2.0, rel=0.04)


def test_a_shorter_text_does_not_replace_a_longer_one() -> None:
    engine = shape_engine(SMALL, "orthrus", CPU, torch.float32, **SETTINGS)
    replayed = replaying(engine, chain_profile(4.0, 8), block_rows=8)
    ar = recorded(scheduled("ar", engine, ARSchedule()), [replayed])
    prompts = [[*range(100, 130), 1]]
    for new_tokens in (60, 1):
        ar.run(prompts, new_tokens)
    assert scheduled("orthrus", engine, replayed).run(prompts, 60).tokens_per_cycle > 3


def test_one_new_token_is_too_few() -> None:
    with pytest.raises(ConfigError, match="at least 2"):
        ShapeBenchOptions(new_tokens=1)
